"""Worker of one rank: labels shard by shard, with loading, computing and storing in parallel.

A shard is done when its marker is written: after its masks, its rows, and a sync.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import torch

from stpp import log
from stpp.clock import Clock
from stpp.distributed import World, threads_per_rank
from stpp.errors import UserError
from stpp.images import batches, planning
from stpp.images.planning import Planned
from stpp.label.assignment import Assignment
from stpp.label.open_shard import Job, OpenShard
from stpp.label.plan import Plan
from stpp.label.prefetch import prefetch
from stpp.label.shards import Ledger, Markers, damage
from stpp.label.update import retract

TOO_LITTLE_MEMORY = "its views need more memory than there is ({width}x{height} pixels)"


class Worker:
    """Labels the shards that one rank claims.

    Args:
        task: parameters of the labelling.
        job: work on each image, prepared.
        plan: shards.
        ledger: claims of this rank.
    """

    def __init__(self, task: Assignment, job: Job, plan: Plan, world: World, ledger: Ledger):
        self._task, self._job, self._plan, self._world, self._ledger = task, job, plan, world, ledger
        self._markers, self.clock = Markers(task.out), Clock()
        self._threads = threads_per_rank(world, task.data.threads)
        self._counting = threading.Lock()
        self.images = self.bad = 0
        """Images labelled by this rank in this run; bad images, including those of shards done before."""
        self.redone: list[str] = []
        """Descriptions of damaged shards."""

    @torch.inference_mode()
    def run(self) -> None:
        """Labels until every shard of the part is done, by this rank or others.

        Raises:
            OSError: the output cannot be written; finished shards stay finished.
            UserError: the device has too little memory for a batch of several images.
        """
        with ThreadPoolExecutor(self._threads, "stpp-plan") as planners, log.Progress(
                self._task.title, self._plan.items) as bar:
            self._bar, self._shown = bar, 0
            self._label(self._ledger.claims(), planners)
            # One by one: the next shard is claimed after the marker of the last is written.
            for shard in self._ledger.left_over():
                self._label(iter([shard]), planners)

    def _label(self, shards: Iterator[int], planners: ThreadPoolExecutor) -> None:
        """Labels shards, and returns when their markers are written."""
        planned_of: dict[int, list[Planned]] = {}

        def planned_shards() -> Iterator[tuple[int, list[Planned]]]:
            for shard in shards:
                if self._is_done(shard):
                    continue
                with self.clock("plan"):
                    planned = self._plan.planned(shard, planners)
                yield shard, planned

        def tasks() -> Iterator[tuple[int, list[Planned]]]:
            for shard, planned in prefetch(planned_shards()):
                planned_of[shard] = planned
                planned_batches = list(planning.batches(planned))
                yield from ((shard, batch) for batch in planned_batches or [[]])

        stream = batches.batches(tasks(), device=self._world.device, kind=self._task.decoder,
                                 threads=self._threads, most=self._plan.cut.max_batch, clock=self.clock)
        pipeline = _Pipeline()
        with ThreadPoolExecutor(self._threads,
                                "stpp-store") as pool, ThreadPoolExecutor(1, "stpp-close") as closer, \
                closing(stream):
            try:
                for shard, batch in stream:
                    if not pipeline.opened or pipeline.opened[-1].shard != shard:
                        pipeline.opened.append(self._opened(shard, planned_of.pop(shard), pool))
                    self._advance(pipeline, batch, closer)
                self._advance(pipeline, None, closer)
                self._close(pipeline, closer)
                if pipeline.ending is not None:
                    pipeline.ending.result()
            except BaseException:
                for open_shard in pipeline.opened:
                    open_shard.abandon()
                raise

    def _opened(self, shard: int, planned: list[Planned], pool: ThreadPoolExecutor) -> OpenShard:
        return OpenShard(shard, planned, self._task, self._job, pool, self.clock)

    def _advance(self, pipeline: "_Pipeline", batch: batches.Decoded | None,
                 closer: ThreadPoolExecutor) -> None:
        """Queues the next batch, then stores the results of the previous one: host and device work in
        parallel.

        The previous results are stored even if the next batch fails.
        """
        before, pipeline.in_flight = pipeline.in_flight, None
        try:
            if batch is not None:
                pipeline.in_flight = self._queued(pipeline.opened[-1], batch)
        finally:
            if before is not None:
                self._deliver(before)
            while len(pipeline.opened) > 1:  # the first has no batch in flight
                self._close(pipeline, closer)

    def _queued(self, shard: OpenShard, batch: batches.Decoded) -> "_InFlight":
        with self.clock("compute"):
            try:
                results = self._job.compute(batch)
            except RuntimeError as error:
                results = partial(list, [_alone_too_large(batch, error)])
        return _InFlight(shard=shard, planned=batch.planned, errors=batch.errors, hashes=batch.hashes,
                         results=results)

    def _deliver(self, batch: "_InFlight") -> None:
        with self.clock("compute"):
            results = batch.results()
        with self.clock("wait"):
            batch.shard.add(batch.planned, batch.errors, batch.hashes, results)
        self._count(len(batch.planned), batch.shard.take_bad())

    def _close(self, pipeline: "_Pipeline", closer: ThreadPoolExecutor) -> None:
        """Closes the first open shard, if there is one, in the closing thread, after the previous close."""
        with self.clock("wait"):
            if pipeline.ending is not None:
                pipeline.ending.result()
        if pipeline.opened:
            shard = pipeline.opened.popleft()
            self._count(shard.unplanned, shard.unplanned)
            pipeline.ending = closer.submit(self._finish, shard)

    def _finish(self, shard: OpenShard) -> None:
        shard.close(self._markers)
        self._ledger.checked(shard.shard)

    def _is_done(self, shard: int) -> bool:
        if not self._markers.done(shard):
            return False
        damaged = damage(self._task.out, self._task.table, shard) if self._task.verify else None
        if damaged is None:
            marker = self._markers.read(shard)
            self._count(marker["images"], marker["bad"], new=False)
            self._ledger.checked(shard)
            return True
        self.redone.append(f"shard {shard}: {damaged}")
        retract(self._task.out)
        self._markers.remove(shard)
        return False

    def _count(self, images: int, bad: int, *, new: bool = True) -> None:
        """Counts finished images, for the progress bar and the heartbeat."""
        with self._counting:
            self.images, self.bad = self.images + images * new, self.bad + bad
            total, all_bad = self._ledger.progress(images, bad)
            self._bar.advance(max(total - self._shown, 0), bad=str(all_bad))
            self._shown = total


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """Batch that the device is computing; without its images, whose memory the next batch needs."""

    shard: OpenShard
    planned: list[Planned]
    errors: dict[int, str]
    hashes: list[int | None]
    results: Callable[[], list]


@dataclass(kw_only=True)
class _Pipeline:
    """Work in progress of one rank."""

    opened: deque[OpenShard] = field(default_factory=deque)
    """Open shards, oldest first: one, or two while the last batch of the first is in flight."""
    in_flight: _InFlight | None = None
    ending: Future | None = None
    """Pending close of the previous shard."""


def _alone_too_large(batch: batches.Decoded, error: RuntimeError) -> str:
    """Error text for a batch of one image that needs too much memory.

    Raises:
        UserError: the batch has several images.
        RuntimeError: the error is not an allocation failure.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
        raise error
    count, _, height, width = batch.images_NCHW.shape
    if count > 1:
        raise UserError(f"a batch of {count} images of {width}x{height} pixels does not fit into memory (the "
                        f"first: {batch.planned[0].item.source}); lower --batch-pixels, --batch-per-rank or "
                        "--max-pixels, with another --out") from error
    if batch.images_NCHW.is_cuda:
        torch.cuda.empty_cache()
    return TOO_LITTLE_MEMORY.format(width=width, height=height)
