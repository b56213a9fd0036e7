"""Interface of the per-image work, and the open shard that stores its results: masks, rows, then a marker."""

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
"""Maximum masks of a shard that wait to be stored."""


class Job(Protocol):
    """Work that is done for every image of a corpus."""

    teacher: str
    """Identity of the network or networks."""
    networks: Sequence[Predictor]
    """Networks that compute the result."""
    settings: dict
    """Settings that determine the result, for the fingerprint: JSON values."""
    classes: Sequence[str]
    """Names of the class ids in the masks, recorded for readers; empty if unknown."""

    def prepare(self, task: Assignment, plan: Plan, world: World) -> None:
        """Computes and writes, below `task.out`, what all shards need; called on one rank, in every run."""
        ...

    def prepared(self, out: Path) -> "Job":
        """Returns the job with the results of `prepare`."""
        ...

    def compute(self, batch: batches.Decoded) -> Callable[[], list[Any]]:
        """Queues the work on a batch.

        Returns:
            A function that waits for the work and returns, on the CPU, the result of each image (None for an
            image that could not be read). It holds no device memory.
        """
        ...

    def sink(self, out: Path, shard: int, clock: Clock) -> Sink | None:
        """Returns the sink of a shard's masks; None if the job writes none."""
        ...

    def row(self, planned: Planned, result: Any, stored: StoredMask | None) -> dict:
        """Returns the row of a good image."""
        ...


class OpenShard:
    """Shard to which results are added; it is done when its marker is written.

    Args:
        planned: all images of the shard.
        pool: threads that store masks.
    """

    def __init__(self, shard: int, planned: list[Planned], task: Assignment, job: Job,
                 pool: ThreadPoolExecutor, clock: Clock):
        self.shard, self._task, self._job, self._pool, self._clock = shard, task, job, pool, clock
        self._sink: Sink | None = job.sink(task.out, shard, clock)
        self._rows: dict[int, dict] = {}
        self._waiting: deque[tuple[Planned, int | None, Any, Future | None]] = deque()
        self._new_bad, self._closed = 0, False
        self._unbatched = [image for image in planned if image.batch < 0]
        self.unplanned = len(self._unbatched)

    def add(self, planned: list[Planned], errors: dict[int, str], hashes: list[int | None],
            results: list) -> None:
        """Adds the results of a batch; blocks while too many masks wait to be stored."""
        for i, (image, image_hash, result) in enumerate(zip(planned, hashes, results, strict=True)):
            error = errors.get(i, result if isinstance(result, str) else None)
            if error is not None:
                self._bad(image, image_hash, error)
                self._new_bad += 1
                continue
            stored = self._pool.submit(self._sink.store, image.item.key,
                                       result.mask_HW) if self._sink else None
            self._waiting.append((image, image_hash, result, stored))
        self._drain(QUEUE)

    def take_bad(self) -> int:
        """Returns the number of bad images since the last call."""
        new, self._new_bad = self._new_bad, 0
        return new

    def close(self, markers: Markers) -> None:
        """Writes the rows, syncs everything to the disk, then writes the marker."""
        try:
            self._drain(0)
            for image in self._unbatched:
                self._bad(image, _hash_of(image), image.error)
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
                os.sync()  # the masks were plain writes, and the marker promises them
            markers.write(self.shard, marker_of(table, part.name, data, archives))

    def abandon(self) -> None:
        """Removes temporary files of a shard that is not closed; does nothing after `close`."""
        if self._sink and not self._closed:
            self._sink.abandon()

    def _bad(self, image: Planned, image_hash: int | None, error: str) -> None:
        if self._sink and image.item.error is None:
            self._sink.discard(image.item.key)
        self._rows[image.position] = rows.bad(image, error, self._job.teacher) | {"image_hash": image_hash}

    def _drain(self, leave: int) -> None:
        while len(self._waiting) > leave:
            image, image_hash, result, future = self._waiting.popleft()
            stored = future.result() if future is not None else None
            if stored is not None:
                self._sink.take(image.item.key, stored)
            self._rows[image.position] = self._job.row(image, result, stored) | {"image_hash": image_hash}


def _hash_of(image: Planned) -> int | None:
    """Hashes an image that is in no batch, so that a later update detects a replaced file."""
    if image.item.error is not None:
        return None  # the name is the error, whatever the content
    try:
        return content_hash(image.item.read())
    except OSError:
        return None
