"""Signals: what is remembered, what is restored, and what a run that is done does with one."""

import os
import signal

import pytest

from crossbatch.engine.runtime.output import console
from crossbatch.engine.runtime.signals import SIGNALS, Signals


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_remembered_and_the_handler_before_comes_back(number, handlers):
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_a_run_that_is_done_does_not_die_of_a_late_signal():
    signals = Signals()
    signals.ignores_late = True
    with signals:
        pass
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert signals.received is None


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "RANK"])
def test_a_terminal_of_open_mpi_is_none(monkeypatch, variable):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any output for a terminal
    monkeypatch.setenv(variable, "0")
    assert console().is_terminal == (variable == "RANK")
