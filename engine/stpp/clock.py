"""Where the time of a labelling went: seconds of every part, added over threads."""

import contextlib
import threading
import time
from collections.abc import Iterator

PARTS = ("plan", "read", "decode", "wait", "compute", "encode", "write")
"""plan: a thread that reads the headers of the next shard. read, decode: threads that load. wait: the main
thread, for an image to come or a mask to go. compute: the main thread, the network and its views. encode,
write: threads that store, and the closing of shards."""


class Clock:
    """Seconds by part."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds what the block takes to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            with self._lock:
                self.seconds[part] += taken
