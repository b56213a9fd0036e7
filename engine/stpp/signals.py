"""SIGTERM and SIGINT: a run that is told to stop saves first, and ends with 143 or 130."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

PATIENCE_S = 3.0
"""A signal that comes again within this time is the same one."""


@dataclass
class Stop:
    """Whether this process was told to stop."""

    signal: int | None = None
    since: float = 0.0

    def leave(self) -> None:
        """Ends the process with 128 + the signal; where another rank was told, as for SIGTERM."""
        sys.exit(128 + (self.signal or signal.SIGTERM))


@contextlib.contextmanager
def ending_on_term() -> Iterator[None]:
    """Within the block SIGTERM ends the process with 143, and what is open is closed on the way out."""
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
    """Within the block SIGTERM and SIGINT are only noted; a SIGINT seconds later ends at once.

    Not the very next one: Ctrl-C reaches every process of the terminal, and torchrun then passes it on once
    more.
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
