"""Signals beside SIGTERM and SIGINT, which uvicorn handles."""

from __future__ import annotations

import signal
from collections.abc import Callable


def handle_further_signals(stop: Callable[[int], None]) -> None:
    """Stop at SIGHUP and SIGQUIT, and ignore SIGUSR1 and SIGUSR2, which end a process otherwise."""
    for name in ("SIGHUP", "SIGQUIT"):
        if number := getattr(signal, name, None):  # not on Windows
            signal.signal(number, lambda number, _: stop(number))
    for name in ("SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
