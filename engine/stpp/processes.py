"""Ordered parallel work in several local processes with bounded memory."""

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
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[..., Result], chunks: Iterable[Chunk], arguments: tuple, workers: int, *,
             died: str) -> Iterator[Result]:
    """Yields `work(chunk, *arguments)` for each chunk, in order.

    Args:
        work: a module-level function, importable by other processes.
        workers: number of processes; 1 runs in this process.
        died: error message if a worker process is killed.

    Raises:
        RuntimeError: a worker process died.
    """
    chunks = iter(chunks)
    if workers == 1:
        yield from (work(chunk, *arguments) for chunk in chunks)
        return
    # spawn: forking a process with threads, as torch has, can deadlock.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        # Few chunks in flight, so that memory stays bounded.
        pending = deque(pool.submit(work, chunk, *arguments) for chunk in islice(chunks, 4 * workers))
        try:
            while pending:
                done = pending.popleft().result()
                pending.extend(pool.submit(work, chunk, *arguments) for chunk in islice(chunks, 1))
                yield done
        except BrokenProcessPool as error:
            raise RuntimeError(died) from error
        finally:
            for future in pending:
                future.cancel()
