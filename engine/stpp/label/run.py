"""A whole run over a corpus: plan, work of all ranks, and the tables at the end."""

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
from stpp.label.shards import PATIENCE_S, Board, Ledger, Markers
from stpp.label.worker import Worker

_LAST_WORDS_S = 3.0
"""How long rank 0 waits for the other ranks' times, which are only shown."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run ended with."""

    images: int
    """Of the shards that are done."""
    bad: int
    class_pixels: list[int]
    pixels: int
    """Of the good images."""
    mean: float | None
    """Mean over the good images of their mean confidence, or of their reliability."""
    shards_left: int
    """Shards that are not done: of other parts, or all where the source was only listed."""
    listed: int = 0
    """Images of the corpus."""
    labelled: int = 0
    """Images that this call labelled, over all ranks."""
    wall_s: float = 0.0
    """Of this call."""
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Time by part (`clock.PARTS`), added over ranks and threads."""
    redone: tuple[str, ...] = ()
    """What was found damaged and done again."""


def execute(task: Assignment, open_job: Callable[[int], Job], here: World, *,
            conclude: Callable[[], None] | None = None) -> Summary:
    """Does what is left of the work on all ranks that call this, until every shard of the part is done.

    Args:
        open_job: makes the networks ready for so many images; every rank calls it once.
        conclude: called once when every shard is done, to write what is made of all of them.

    Raises:
        UserError: the source, the settings or the output do not allow it.
        OSError: the output cannot be written.
    """
    started, board = time.monotonic(), Board.of_this_call(here)
    _on_first(here, board, "listed", lambda: listings.ensure(task))
    listing = listings.read(task.out)
    if listing is None:
        raise UserError(f"{task.out}/plan is not there; is --out on a file system that every machine sees?")
    plan = Plan(folder=task.out / "plan", items=listing["items"], shards=listing["shards"], cut=task.cut)
    markers = Markers(task.out)
    if task.list_only:
        return dataclasses.replace(_total(plan, markers), wall_s=time.monotonic() - started)
    threads = _agreed_threads(task.out, here, board)
    with _threads(threads):
        job = open_job(plan.items)
        kind = fingerprint.device_kind(here.device)
        _on_first(here, board, "claimed", lambda: _claim(task, job, listing, kind, threads))
        _require_kind(task.out, here, kind)
        if not here.is_main:  # one that reads another checkpoint or lacks DALI would mix its masks in
            _claim(task, job, listing, kind, threads)
        _on_first(here, board, "prepared", lambda: job.prepare(task, plan, here))
        job = job.prepared(task.out)
        ledger = Ledger(here, board, shards=plan.shards, part=task.part, done=markers.done)
        worker = Worker(task, job, plan, here, ledger)
        worker.run()
        _keep_agreements(task.out, job, here)
    labelled, seconds, redone = _gathered(here, board, worker)
    for text in redone:
        log.say(f"  damaged, labelled again: {text}")
    if all(map(markers.done, range(plan.shards))):
        _once(board, lambda: _conclude(task, plan, markers, conclude))
        total = Summary(**json.loads((task.out / "summary.json").read_text(encoding="utf-8")), shards_left=0,
                        listed=plan.items)
    else:
        total = _total(plan, markers)
    return dataclasses.replace(total, labelled=labelled, wall_s=time.monotonic() - started, seconds=seconds,
                               redone=redone)


def _agreed_threads(out: Path, here: World, board: Board | None) -> int:
    """Threads that compute: those that the run was begun with, because another number of ranks must not
    change the result."""
    found = []

    def decide() -> None:
        existing = fingerprint.read(out)
        found.append(existing["fingerprint"]["threads"] if existing else torch.get_num_threads())
        if board is not None:
            board.set("threads", str(found[0]))

    _on_first(here, board, "agreed", decide)
    return found[0] if found else int(board.get("threads"))


def _claim(task: Assignment, job: Job, listing: dict, kind: str, threads: int) -> None:
    """Takes the output for this run, or checks that it is this run's."""
    existing = fingerprint.read(task.out)
    ours = {"source": listing["source"], **job.settings, "cut": dataclasses.asdict(task.cut),
            "shard_size": listing["shard_size"], "decoder": task.decoder, "device_kind": kind,
            "threads": threads}
    ours = json.loads(json.dumps(ours))
    if existing:
        # The source may have grown since: `listing.ensure` judges it.
        fingerprint.require_same(task.out, existing["fingerprint"] | {"source": ours["source"]}, ours)
    else:
        fingerprint.write(task.out, ours, {"items": listing["items"], "shards": listing["shards"]},
                          job.classes)


def _require_kind(out: Path, here: World, kind: str) -> None:
    """Refuses a rank on another kind of device than that of the run."""
    found = fingerprint.read(out)["fingerprint"]["device_kind"]
    if found != kind:
        raise UserError(f"--out {out}: the run began on {found}, but rank {here.rank} has {kind}; label on "
                        "devices of one kind")


def _keep_agreements(out: Path, job: Job, here: World) -> None:
    """Writes how engines agreed with eager on the first images of this rank, if any were judged in this
    call."""
    found = [getattr(network, "agreement", None) for network in job.networks]
    if any(found):
        files.write_json(out / f"agreement-rank{here.rank}.json", {
            "teacher": job.teacher, "engines": [one and dataclasses.asdict(one) for one in found]})


def _conclude(task: Assignment, plan: Plan, markers: Markers, conclude: Callable[[], None] | None) -> None:
    """Writes the tables that speak of the whole corpus; their bytes depend on the shards alone."""
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


def _on_first(here: World, board: Board | None, name: str, action: Callable[[], None]) -> None:
    """Rank 0 acts while the others wait, for as long as it takes; if it fails, only it says why.

    Raises:
        SystemExit: with code 2, on the other ranks, when rank 0 failed.
    """
    if board is None:
        action()
    elif here.is_main:
        try:
            action()
        except BaseException:
            board.set(name, "failed")
            raise
        board.set(name, "done")
    elif board.wait(name) == "failed":
        raise SystemExit(2)


def _once(board: Board | None, action: Callable[[], None]) -> None:
    """One rank acts, the others wait for it; not for long, because it may be stopped, and acting twice does
    no harm."""
    if board is None or board.add("conclude", 1) == 1:
        action()
        if board is not None:
            board.set("concluded", "done")
    elif board.wait("concluded", PATIENCE_S) is None:
        action()


def _gathered(here: World, board: Board | None,
              worker: Worker) -> tuple[int, dict[str, float], tuple[str, ...]]:
    """Images labelled, time by part and damage found by all ranks; on ranks but the first, and of a stopped
    one, what is known."""
    if board is None:
        return worker.images, worker.clock.seconds, tuple(worker.redone)
    board.set(f"last/{here.rank}", json.dumps([worker.images, worker.clock.seconds, worker.redone]))
    end = time.monotonic() + (_LAST_WORDS_S if here.is_main else 0)
    images, seconds, redone = 0, dict.fromkeys(PARTS, 0.0), []
    for rank in range(here.size):
        text = board.wait(f"last/{rank}", max(end - time.monotonic(), 0))
        if text is not None:
            more, parts, damaged = json.loads(text)
            images, redone = images + more, redone + damaged
            seconds = {name: seconds[name] + parts[name] for name in PARTS}
    return images, seconds, tuple(redone)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Computes with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
