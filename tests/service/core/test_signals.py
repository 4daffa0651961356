"""Signals beside SIGTERM and SIGINT, in this process; test_workers.py sends real ones."""

import signal

import pytest

from service.core.signals import handle_further_signals

SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def stopped():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    numbers: list[int] = []
    handle_further_signals(numbers.append)
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_signals_that_stop(stopped, number):
    signal.raise_signal(number)
    assert stopped == [number]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_that_are_ignored(stopped, number):
    signal.raise_signal(number)
    assert stopped == []
