"""Preparing the next of something while the present one is used."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields `items`, each prepared in a thread while the one before is used; what it raises is raised
    here."""
    prepared: queue.SimpleQueue = queue.SimpleQueue()
    room, stopped = threading.Semaphore(1), threading.Event()

    def prepare() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                prepared.put((next(items, _END), None))
        except BaseException as error:  # for whoever waits
            prepared.put((_END, error))

    # A daemon: it may hang in a read when the run ends by an error.
    threading.Thread(target=prepare, name="stpp-ahead", daemon=True).start()
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
