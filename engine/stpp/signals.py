"""SIGTERM and SIGINT: a run that is told to stop saves first and exits with 143 or 130."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

PATIENCE_S = 3.0
"""Window in seconds in which a repeated signal counts as the same one."""


@dataclass
class Stop:
    """Stop request of this process."""

    signal: int | None = None
    since: float = 0.0

    def leave(self) -> None:
        """Exits with 128 + the signal; with SIGTERM's code if another rank received the signal."""
        sys.exit(128 + (self.signal or signal.SIGTERM))


@contextlib.contextmanager
def ending_on_term() -> Iterator[None]:
    """Exits with 143 on SIGTERM within the block, closing open files on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """Records SIGTERM and SIGINT within the block; a SIGINT seconds after the first interrupts immediately.

    Repeats within `PATIENCE_S` are ignored: Ctrl-C reaches every process of the terminal, and torchrun
    forwards it once more.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _) -> None:
        if stop.signal is None:
            stop.signal, stop.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - stop.since > PATIENCE_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
