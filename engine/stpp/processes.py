"""Work in several processes of this machine, its results in order and its memory bounded."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[..., Result], chunks: Iterable[Chunk], arguments: tuple, workers: int, *,
             died: str) -> Iterator[Result]:
    """Yields `work(chunk, *arguments)` of each chunk, in order.

    Args:
        work: a function of a module, which other processes can import.
        workers: processes; 1: this one.
        died: what to say where one is killed.

    Raises:
        RuntimeError: a process died.
    """
    chunks = iter(chunks)
    if workers == 1:
        yield from (work(chunk, *arguments) for chunk in chunks)
        return
    # spawn: a fork of a process that runs threads, as torch does, can lock up.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # A few chunks in flight only, so that memory does not grow with their number.
        flying = deque(pool.submit(work, chunk, *arguments) for chunk in islice(chunks, 4 * workers))
        try:
            while flying:
                done = flying.popleft().result()
                flying.extend(pool.submit(work, chunk, *arguments) for chunk in islice(chunks, 1))
                yield done
        except BrokenProcessPool as error:
            raise RuntimeError(died) from error
        finally:
            for future in flying:
                future.cancel()
