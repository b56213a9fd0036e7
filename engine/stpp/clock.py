"""Labelling time by activity: seconds, summed over threads."""

import contextlib
import threading
import time
from collections.abc import Iterator

PARTS = ("plan", "read", "decode", "wait", "compute", "encode", "write")
"""plan: the thread that reads the headers of the next shard. read, decode: loader threads. wait: the main
thread, idle until an image arrives or a mask is taken. compute: the main thread, for the network and its
views. encode, write: storage threads, and closing shards."""


class Clock:
    """Accumulated seconds by part."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the duration of the block to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            with self._lock:
                self.seconds[part] += taken
