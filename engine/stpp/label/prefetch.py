"""Iterator that prepares the next item in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yields `items`, preparing each in a thread while the previous one is used; re-raises the thread's
    errors."""
    prepared: queue.SimpleQueue = queue.SimpleQueue()
    room, stopped = threading.Semaphore(1), threading.Event()

    def prepare() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                prepared.put((next(items, _END), None))
        except BaseException as error:  # for the consumer
            prepared.put((_END, error))

    # A daemon: it may hang in a read when the run ends with an error.
    threading.Thread(target=prepare, name="stpp-prefetch", daemon=True).start()
    try:
        while True:
            item, error = prepared.get()
            if error is not None:
                raise error
            if item is _END:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
