"""What one rank does: shard by shard, with loading, computing and storing at the same time.

A shard counts when its marker is written: after its masks, its rows, and a sync.
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
from stpp.label.ahead import ahead
from stpp.label.assignment import Assignment
from stpp.label.open_shard import Job, OpenShard
from stpp.label.plan import Plan
from stpp.label.shards import Ledger, Markers, damage

TOO_LITTLE_MEMORY = "its views need more memory than there is ({width}x{height} pixels)"


class Worker:
    """Labels the shards that the ledger gives out, as one rank.

    Args:
        task: the labelling.
        job: what is computed, ready.
        plan: the shards.
        ledger: which of them are this rank's.
    """

    def __init__(self, task: Assignment, job: Job, plan: Plan, here: World, ledger: Ledger):
        self._task, self._job, self._plan, self._here, self._ledger = task, job, plan, here, ledger
        self._markers, self.clock = Markers(task.out), Clock()
        self._threads = threads_per_rank(here, task.data.threads)
        self._counting = threading.Lock()
        self.images = self.bad = 0
        """Labelled by this rank in this run; and bad ones, those of shards done before too."""
        self.redone: list[str] = []
        """What was found damaged."""

    @torch.inference_mode()
    def run(self) -> None:
        """Labels until every shard of this rank's share is done, by it or by others.

        Raises:
            OSError: the output cannot be written; what is done stays done.
            UserError: the device has too little memory for several images at once.
        """
        with ThreadPoolExecutor(self._threads, "stpp-plan") as planners, log.Progress(
                self._task.title, self._plan.items) as bar:
            self._bar, self._shown = bar, 0
            self._label(self._ledger.claims(), planners)
            # One by one: the next is asked for only when the last one's marker is there.
            for shard in self._ledger.left_over():
                self._label(iter([shard]), planners)

    def _label(self, shards: Iterator[int], planners: ThreadPoolExecutor) -> None:
        """Labels the given shards; their markers are written when it returns."""
        planned_of: dict[int, list[Planned]] = {}

        def planned_shards() -> Iterator[tuple[int, list[Planned]]]:
            for shard in shards:
                if self._is_done(shard):
                    continue
                with self.clock("plan"):
                    planned = self._plan.planned(shard, planners)
                yield shard, planned

        def tasks() -> Iterator[tuple[int, list[Planned]]]:
            for shard, planned in ahead(planned_shards()):
                planned_of[shard] = planned
                cut = list(planning.batches(planned))
                yield from ((shard, batch) for batch in cut or [[]])

        stream = batches.batches(tasks(), device=self._here.device, kind=self._task.decoder,
                                 threads=self._threads, most=self._plan.cut.max_batch, clock=self.clock)
        line = _Line()
        with ThreadPoolExecutor(self._threads,
                                "stpp-store") as pool, ThreadPoolExecutor(1, "stpp-close") as closer, \
                closing(stream):
            try:
                for shard, batch in stream:
                    if not line.opened or line.opened[-1].shard != shard:
                        line.opened.append(self._opened(shard, planned_of.pop(shard), pool))
                    self._advance(line, batch, closer)
                self._advance(line, None, closer)
                self._close(line, closer)
                if line.ending is not None:
                    line.ending.result()
            except BaseException:
                for one in line.opened:
                    one.abandon()
                raise

    def _opened(self, shard: int, planned: list[Planned], pool: ThreadPoolExecutor) -> OpenShard:
        return OpenShard(shard, planned, self._task, self._job, pool, self.clock)

    def _advance(self, line: "_Line", batch: batches.Decoded | None, closer: ThreadPoolExecutor) -> None:
        """Queues the next batch, then takes the results of the one before: host and device work at once.

        What the one before ended with is kept also where the next one fails.
        """
        before, line.in_flight = line.in_flight, None
        try:
            if batch is not None:
                line.in_flight = self._queued(line.opened[-1], batch)
        finally:
            if before is not None:
                self._deliver(before)
            while len(line.opened) > 1:  # nothing of the first is in flight any more
                self._close(line, closer)

    def _queued(self, shard: OpenShard, batch: batches.Decoded) -> "_InFlight":
        with self.clock("compute"):
            try:
                results = self._job.compute(batch)
            except RuntimeError as error:
                results = partial(list, [_alone_too_large(batch, error)])
        return _InFlight(shard=shard, planned=batch.planned, errors=batch.errors, hashes=batch.hashes,
                         results=results)

    def _deliver(self, one: "_InFlight") -> None:
        with self.clock("compute"):
            results = one.results()
        with self.clock("wait"):
            one.shard.add(one.planned, one.errors, one.hashes, results)
        self._count(len(one.planned), one.shard.take_bad())

    def _close(self, line: "_Line", closer: ThreadPoolExecutor) -> None:
        """Ends the first open shard, if there is one, in a thread of its own, after the one before."""
        with self.clock("wait"):
            if line.ending is not None:
                line.ending.result()
        if line.opened:
            shard = line.opened.popleft()
            self._count(shard.unplanned, shard.unplanned)
            line.ending = closer.submit(shard.close, self._markers)

    def _is_done(self, shard: int) -> bool:
        if not self._markers.done(shard):
            return False
        found = damage(self._task.out, self._task.table, shard) if self._task.verify else None
        if found is None:
            marker = self._markers.read(shard)
            self._count(marker["images"], marker["bad"], new=False)
            return True
        self.redone.append(f"shard {shard}: {found}")
        self._markers.remove(shard)
        return False

    def _count(self, images: int, bad: int, *, new: bool = True) -> None:
        """Counts images that are done, for the bar and as a sign of life."""
        with self._counting:
            self.images, self.bad = self.images + images * new, self.bad + bad
            total, all_bad = self._ledger.progress(images, bad)
            self._bar.advance(max(total - self._shown, 0), bad=str(all_bad))
            self._shown = total


@dataclass(frozen=True, kw_only=True)
class _InFlight:
    """A batch that the device works on; without its images, whose memory the next one needs."""

    shard: OpenShard
    planned: list[Planned]
    errors: dict[int, str]
    hashes: list[int | None]
    results: Callable[[], list]


@dataclass(kw_only=True)
class _Line:
    """What is under way, oldest first."""

    opened: deque[OpenShard] = field(default_factory=deque)
    """Shards that images are added to: one, or two while the last batch of the first is in flight."""
    in_flight: _InFlight | None = None
    ending: Future | None = None
    """The close of the shard before."""


def _alone_too_large(batch: batches.Decoded, error: RuntimeError) -> str:
    """Why the one image of a batch has no label, if what failed is for want of memory.

    Raises:
        UserError: there are several images.
        RuntimeError: something else failed.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
        raise error
    count, _, height, width = batch.images_NCHW.shape
    if count > 1:
        raise UserError(f"{count} images of {width}x{height} pixels need more memory than there is (the "
                        f"first: {batch.planned[0].item.source}); lower --batch-pixels, --batch-per-rank or "
                        "--max-pixels, with another --out") from error
    if batch.images_NCHW.is_cuda:
        torch.cuda.empty_cache()
    return TOO_LITTLE_MEMORY.format(width=width, height=height)
