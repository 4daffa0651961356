"""Tables and figures of a study's result files; see `python -m benchmarks.study.report --help`."""
