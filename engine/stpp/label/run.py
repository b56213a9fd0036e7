"""Labelling run over a corpus: plan, work of all ranks, and final tables."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import files, log
from stpp.clock import PARTS
from stpp.distributed import World
from stpp.errors import UserError
from stpp.label import fingerprint, rows
from stpp.label import listing as listings
from stpp.label.assignment import Assignment
from stpp.label.open_shard import Job
from stpp.label.plan import Plan
from stpp.label.shards import PATIENCE_S, Ledger, Markers, RankStore
from stpp.label.worker import Worker

_LAST_WORDS_S = 3.0
"""Maximum wait of rank 0 for the other ranks' times, which are only displayed."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Result of a run."""

    images: int
    """Images of finished shards."""
    bad: int
    class_pixels: list[int]
    pixels: int
    """Pixels of the good images."""
    mean: float | None
    """Mean confidence, or mean reliability, over the good images."""
    shards_left: int
    """Unfinished shards: of other parts, or all after `list_only`."""
    listed: int = 0
    """Images of the corpus."""
    labelled: int = 0
    """Images labelled by this call, summed over ranks."""
    wall_s: float = 0.0
    """Wall time of this call."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Time by part (`clock.PARTS`), summed over ranks and threads."""
    redone: tuple[str, ...] = ()
    """Descriptions of damaged shards that were labelled again."""


def execute(task: Assignment, open_job: Callable[[int], Job], world: World, *,
            conclude: Callable[[], None] | None = None) -> Summary:
    """Labels the remaining shards of the part on all ranks that call this, until all are done.

    Args:
        open_job: makes the networks ready for a number of images; every rank calls it once.
        conclude: called once when every shard is done, to write files about the whole corpus.

    Raises:
        UserError: the source, the settings or the output are invalid.
        OSError: the output cannot be written.
    """
    started, rank_store = time.monotonic(), RankStore.for_call(world)
    updates: list[Callable[[], None]] = []

    def carry_out_update() -> None:
        for update in updates:
            update()

    _on_first(world, rank_store, "listed", lambda: updates.extend(listings.ensure(task)))
    listing, markers = _listed(task.out), Markers(task.out)
    if task.list_only:
        carry_out_update()
        plan = _plan(task, _listed(task.out))
        return dataclasses.replace(_total(plan, markers), wall_s=time.monotonic() - started)
    threads = _agreed_threads(task.out, world, rank_store)
    with _threads(threads):
        begun = fingerprint.read(task.out)
        job = open_job(fingerprint.planned_for(begun) if begun else listing["items"])
        kind = fingerprint.device_kind(world.device)
        _on_first(world, rank_store, "claimed", lambda: _claim(task, job, listing, kind, threads))
        _require_kind(task.out, world, kind)
        if not world.is_main:  # a rank with another checkpoint or without DALI would write other masks
            _claim(task, job, listing, kind, threads)
        # only now, when the settings are known to fit: an update removes masks
        _on_first(world, rank_store, "updated", carry_out_update)
        plan = _plan(task, _listed(task.out))
        _on_first(world, rank_store, "prepared", lambda: job.prepare(task, plan, world))
        job = job.prepared(task.out)
        ledger = Ledger(world, rank_store, shards=plan.shards, part=task.part, done=markers.done,
                        verify=task.verify)
        worker = Worker(task, job, plan, world, ledger)
        worker.run()
        _keep_agreements(task.out, job, world)
    labelled, seconds, redone = _gathered(world, rank_store, worker)
    for text in redone:
        log.say(f"  damaged, labelled again: {text}")
    if all(map(markers.done, range(plan.shards))):
        _once(rank_store, lambda: _conclude(task, plan, markers, conclude))
        total = Summary(**json.loads((task.out / "summary.json").read_text(encoding="utf-8")), shards_left=0,
                        listed=plan.items)
    else:
        total = _total(plan, markers)
    return dataclasses.replace(total, labelled=labelled, wall_s=time.monotonic() - started, seconds=seconds,
                               redone=redone)


def _listed(out: Path) -> dict:
    listing = listings.read(out)
    if listing is None:
        raise UserError(f"{out}/plan is missing; put --out on a file system that every machine sees")
    return listing


def _plan(task: Assignment, listing: dict) -> Plan:
    return Plan(folder=task.out / "plan", items=listing["items"], shards=listing["shards"], cut=task.cut)


def _agreed_threads(out: Path, world: World, rank_store: RankStore | None) -> int:
    """Number of compute threads: that of the run's first call, because the number of ranks must not change
    the result."""
    decided = []

    def decide() -> None:
        existing = fingerprint.read(out)
        decided.append(existing["fingerprint"]["threads"] if existing else torch.get_num_threads())
        if rank_store is not None:
            rank_store.set("threads", str(decided[0]))

    _on_first(world, rank_store, "agreed", decide)
    return decided[0] if decided else int(rank_store.get("threads"))


def _claim(task: Assignment, job: Job, listing: dict, kind: str, threads: int) -> None:
    """Claims the output for this run, or checks that this run began it."""
    existing = fingerprint.read(task.out)
    current = {"source": listing["source"], **job.settings, "cut": dataclasses.asdict(task.cut),
               "shard_size": listing["shard_size"], "decoder": task.decoder, "device_kind": kind,
               "threads": threads}
    current = json.loads(json.dumps(current))
    if existing:
        # The source may have grown since: `listing.ensure` checks it.
        fingerprint.require_same(task.out, existing["fingerprint"] | {"source": current["source"]}, current)
    else:
        fingerprint.write(task.out, current, {"items": listing["items"], "shards": listing["shards"]},
                          job.classes, listing["items"])


def _require_kind(out: Path, world: World, kind: str) -> None:
    """Rejects a rank on another kind of device than that of the run."""
    recorded = fingerprint.read(out)["fingerprint"]["device_kind"]
    if recorded != kind:
        raise UserError(f"--out {out}: the run began on {recorded}, but rank {world.rank} has {kind}; label "
                        "on devices of one kind")


def _keep_agreements(out: Path, job: Job, world: World) -> None:
    """Writes the agreement of engines with eager on this rank's first images, if measured in this call."""
    agreements = [getattr(network, "agreement", None) for network in job.networks]
    if any(agreements):
        files.write_json(out / f"agreement-rank{world.rank}.json", {
            "teacher": job.teacher,
            "engines": [agreement and dataclasses.asdict(agreement) for agreement in agreements]})


def _conclude(task: Assignment, plan: Plan, markers: Markers, conclude: Callable[[], None] | None) -> None:
    """Writes the tables about the whole corpus; their bytes depend on the shards alone."""
    def failed() -> Iterator[dict]:
        for shard in range(plan.shards):
            marker = markers.read(shard)
            if marker["bad"]:
                table = rows.read(task.out / task.table / marker["rows"]["path"])
                yield from (row for row in table if row["status"] != "ok")

    rows.write(task.out / "failed.parquet", failed(), rows.TABLES[task.table])
    if conclude is not None:
        conclude()
    total = dataclasses.asdict(_total(plan, markers))
    files.write_json(task.out / "summary.json",
                     {name: total[name] for name in ("images", "bad", "class_pixels", "pixels", "mean")})


def _total(plan: Plan, markers: Markers) -> Summary:
    images = bad = pixels = left = 0
    classes, confidence = [], 0.0
    for shard in range(plan.shards):
        if not markers.done(shard):
            left += 1
            continue
        marker = markers.read(shard)
        images, bad, pixels = images + marker["images"], bad + marker["bad"], pixels + marker["pixels"]
        confidence += marker["confidence"]
        counts = marker["class_pixels"]
        classes = [a + b for a,
                   b in zip(classes, counts, strict=True)] if classes and counts else classes or counts
    return Summary(images=images, bad=bad, class_pixels=classes, pixels=pixels, shards_left=left,
                   listed=plan.items, mean=confidence / (images - bad) if images > bad else None)


def _on_first(world: World, rank_store: RankStore | None, name: str, action: Callable[[], None]) -> None:
    """Runs `action` on rank 0 while the others wait, without a timeout; only rank 0 reports a failure.

    Raises:
        SystemExit: with code 2, on the other ranks, if rank 0 failed.
    """
    if rank_store is None:
        action()
    elif world.is_main:
        try:
            action()
        except BaseException:
            rank_store.set(name, "failed")
            raise
        rank_store.set(name, "done")
    elif rank_store.wait(name) == "failed":
        raise SystemExit(2)


def _once(rank_store: RankStore | None, action: Callable[[], None]) -> None:
    """Runs `action` on one rank while the others wait. As that rank may have stopped, the wait is limited;
    running `action` twice is harmless."""
    if rank_store is None or rank_store.add("conclude", 1) == 1:
        action()
        if rank_store is not None:
            rank_store.set("concluded", "done")
    elif rank_store.wait("concluded", PATIENCE_S) is None:
        action()


def _gathered(world: World, rank_store: RankStore | None,
              worker: Worker) -> tuple[int, dict[str, float], tuple[str, ...]]:
    """Images labelled, time by part and damage of all ranks; on rank 0 complete except for stopped ranks, on
    others what is known."""
    if rank_store is None:
        return worker.images, worker.clock.seconds, tuple(worker.redone)
    rank_store.set(f"last/{world.rank}", json.dumps([worker.images, worker.clock.seconds, worker.redone]))
    end = time.monotonic() + (_LAST_WORDS_S if world.is_main else 0)
    images, seconds, redone = 0, dict.fromkeys(PARTS, 0.0), []
    for rank in range(world.size):
        text = rank_store.wait(f"last/{rank}", max(end - time.monotonic(), 0))
        if text is not None:
            more, parts, damaged = json.loads(text)
            images, redone = images + more, redone + damaged
            seconds = {name: seconds[name] + parts[name] for name in PARTS}
    return images, seconds, tuple(redone)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sets the number of compute threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
