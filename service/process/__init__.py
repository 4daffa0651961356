"""How the service runs: the processors it may use, one process that serves, and several."""
