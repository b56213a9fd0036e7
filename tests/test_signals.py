"""Signals: checkpoint requests, exit codes and repeated interrupts."""

import signal
import subprocess
import sys
import time

import pytest

from stpp import signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_gives_the_code(number, code):
    before = signal.getsignal(number)
    with signals.deferred() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)  # as torchrun passes it on
        assert stop.signal == number
    assert signal.getsignal(number) == before
    with pytest.raises(SystemExit) as ended:
        stop.leave()
    assert ended.value.code == code


def test_second_interrupt_ends_immediately(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_S", 0.0)
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        signal.raise_signal(signal.SIGINT)


def test_rank_without_own_signal_ends_as_after_sigterm():
    with pytest.raises(SystemExit) as ended:
        signals.Stop().leave()
    assert ended.value.code == 143


def test_sigterm_outside_training_closes_open_resources():
    text = """
import signal
from stpp import signals
with signals.ending_on_term():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        print("closed")
"""
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (143, "closed\n")
