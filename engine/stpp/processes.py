"""Ordered parallel work in several local processes with bounded memory."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TypeVar

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OtherLoad:
    """Use of this process's cores by other processes, from /proc/stat."""

    def __init__(self):
        self._before = self._sample()

    def cores(self) -> float | None:
        """Mean number of cores that other processes used since the last call; None without /proc/stat.

        Other ranks of the same run count as others.
        """
        before, self._before = self._before, self._sample()
        if before is None or self._before is None or self._before[0] <= before[0]:
            return None
        passed_s, busy_s, own_s = (now - then for now, then in zip(self._before, before, strict=True))
        return max((busy_s - own_s) / passed_s, 0.0)

    def cause(self) -> str:
        """Formats `cores` as the end of a message on slow threads; empty if they are unknown."""
        cores = self.cores()
        return "" if cores is None else f"; other processes use {cores:.1f} of the cores of this one"

    @staticmethod
    def _sample() -> tuple[float, float, float] | None:
        """Seconds of the clock, in which the cores were busy, and that this process used."""
        try:
            lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
            mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        except (OSError, AttributeError):
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal, then guests, which user and nice contain
        counts = [[int(count) for count in line.split()[1:9]] for line in lines if line.split()[0] in mine]
        busy = sum(sum(line) - line[3] - line[4] for line in counts) / os.sysconf("SC_CLK_TCK")
        if not busy:  # a sandbox that shows the file, but counts nothing
            return None
        used = os.times()
        return time.monotonic(), busy, used.user + used.system


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
