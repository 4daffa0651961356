"""A study's result files as tables and pictures; see `ghm report --help`."""
