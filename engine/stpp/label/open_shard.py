"""What is computed of images, and what is kept of it: a shard's masks, its rows, and at last its marker."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from stpp import files
from stpp.clock import Clock
from stpp.distributed import World
from stpp.images import batches
from stpp.images.items import content_hash
from stpp.images.planning import Planned
from stpp.inference.open import Predictor
from stpp.label import rows
from stpp.label.assignment import Assignment
from stpp.label.plan import Plan
from stpp.label.shards import Markers, marker_of
from stpp.label.sinks import Sink, StoredMask

QUEUE = 64
"""Masks of a shard that wait to be stored, at most."""


class Job(Protocol):
    """Work on every image of a corpus."""

    teacher: str
    """Identity of the network or networks."""
    networks: Sequence[Predictor]
    """What computes."""
    settings: dict
    """What decides the result, for the fingerprint: JSON values."""
    classes: Sequence[str]
    """Names of the class ids in masks, for those who read them; empty where they are not known."""

    def prepare(self, task: Assignment, plan: Plan, here: World) -> None:
        """Finds out what must be known before the first shard, and keeps it below `task.out`; one rank does
        it, in every call."""
        ...

    def prepared(self, out: Path) -> "Job":
        """The job with what was found out."""
        ...

    def compute(self, batch: batches.Decoded) -> Callable[[], list[Any]]:
        """Queues the work on a batch.

        Returns:
            What waits for it, and returns what becomes of each image that is no blank (None for a blank), on
            the CPU. It holds no memory of the device.
        """
        ...

    def sink(self, out: Path, shard: int, clock: Clock) -> Sink | None:
        """Where the masks of a shard go, if there are masks."""
        ...

    def row(self, one: Planned, result: Any, stored: StoredMask | None) -> dict:
        """The row of a good image."""
        ...


class OpenShard:
    """A shard that images are added to; it is done when its marker is written.

    Args:
        planned: all its images.
        pool: stores masks.
    """

    def __init__(self, shard: int, planned: list[Planned], task: Assignment, job: Job,
                 pool: ThreadPoolExecutor, clock: Clock):
        self.shard, self._task, self._job, self._pool, self._clock = shard, task, job, pool, clock
        self._sink: Sink | None = job.sink(task.out, shard, clock)
        self._rows: dict[int, dict] = {}
        self._waiting: deque[tuple[Planned, int | None, Any, Future | None]] = deque()
        self._fresh_bad, self._closed = 0, False
        self._never = [one for one in planned if one.batch < 0]
        self.unplanned = len(self._never)

    def add(self, planned: list[Planned], errors: dict[int, str], hashes: list[int | None],
            results: list) -> None:
        """Takes what a batch ended with; waits while too many masks wait to be stored."""
        for i, (one, found, result) in enumerate(zip(planned, hashes, results, strict=True)):
            error = errors.get(i, result if isinstance(result, str) else None)
            if error is not None:
                self._bad(one, found, error)
                self._fresh_bad += 1
                continue
            stored = self._pool.submit(self._sink.store, one.item.key, result.mask_HW) if self._sink else None
            self._waiting.append((one, found, result, stored))
        self._drain(QUEUE)

    def take_bad(self) -> int:
        """Bad images since it was last asked."""
        fresh, self._fresh_bad = self._fresh_bad, 0
        return fresh

    def close(self, markers: Markers) -> None:
        """Writes the rows, makes everything last, then writes the marker."""
        try:
            self._drain(0)
            for one in self._never:
                self._bad(one, _hash_of(one), one.error)
            self._commit(markers)
        except BaseException:
            self.abandon()
            raise

    def _commit(self, markers: Markers) -> None:
        task = self._task
        with self._clock("write"):
            archives = self._sink.close() if self._sink else []
            self._closed = True
            table = [self._rows[position] for position in sorted(self._rows)]
            part = rows.part(task.out, task.table, self.shard)
            data = rows.encoded(table, rows.TABLES[task.table])
            with files.atomic(part) as file:
                file.write(data)
            if self._sink and hasattr(os, "sync"):
                os.sync()  # the masks were plain writes; the marker says that they are there
            markers.write(self.shard, marker_of(table, part.name, data, archives))

    def abandon(self) -> None:
        """Removes what a shard that is not closed leaves behind; nothing after `close`."""
        if self._sink and not self._closed:
            self._sink.abandon()

    def _bad(self, one: Planned, found: int | None, error: str) -> None:
        self._rows[one.position] = rows.bad(one, error, self._job.teacher) | {"image_hash": found}

    def _drain(self, leave: int) -> None:
        while len(self._waiting) > leave:
            one, found, result, future = self._waiting.popleft()
            stored = future.result() if future is not None else None
            if stored is not None:
                self._sink.take(one.item.key, stored)
            self._rows[one.position] = self._job.row(one, result, stored) | {"image_hash": found}


def _hash_of(one: Planned) -> int | None:
    """Of an image that is in no batch: it tells later whether the file was replaced."""
    if one.item.error is not None:
        return None  # its name is what is wrong, whatever it holds
    try:
        return content_hash(one.item.read())
    except OSError:
        return None
