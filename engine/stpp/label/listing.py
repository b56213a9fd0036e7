"""Listing of a corpus into the plan, and updates of the listing when the corpus has changed."""

import json
from collections.abc import Callable
from pathlib import Path

from stpp import files, log, outputs
from stpp.errors import UserError
from stpp.images.items import Item
from stpp.label import fingerprint, rows, update
from stpp.label.assignment import Assignment
from stpp.label.changes import compare
from stpp.label.plan import Plan, listing_path, make
from stpp.label.sinks import sweep

OUTPUTS = ("plan", "shards", "masks", "labels", "run.json", "summary.json", "failed.parquet",
           "reliability.parquet", "reliable_ids.txt", "unreliable_ids.txt")
"""Files and folders of a labelling or ranking."""


def read(out: Path) -> dict | None:
    """Reads `plan/listing.json`; None if there is no listing.

    Raises:
        UserError: the file is damaged.
    """
    path = out / "plan" / "listing.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --out") from None


def ensure(task: Assignment) -> list[Callable[[], None]]:
    """Lists the source into the plan, or checks that the existing listing is up to date.

    Returns:
        The update to carry out, at most one, if there are changes; it removes masks.

    Raises:
        UserError: there is no image; the source is another one; or images changed without `task.update`.
        OSError: the output cannot be written.
    """
    try:
        outputs.claim(task.out, OUTPUTS, earlier="plan/listing.json")
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {task.out}: is a file, or inside one; choose another --out") from None
    update.finish(task.out, task.table)
    stamp, listing = task.source.stamp(), read(task.out)
    sweep(task.out)
    if listing is None:
        _list(task, stamp)
        return []
    if _is_moved(listing["source"], stamp):  # the images of a run, below another root
        _list(task, stamp)
        return []
    _require_same_source(task, listing, stamp)
    return [] if _is_same(listing["source"], stamp) else [_update(task, listing, stamp)]


def _list(task: Assignment, stamp: dict) -> None:
    log.say(f"  {task.title}: listing the images")
    (task.out / "plan").mkdir(parents=True, exist_ok=True)
    counts = make(task.source, task.out / "plan", shard_size=task.config.shard_size)
    _say_passed(task)
    files.write_json(task.out / "plan" / "listing.json",
                     counts | {"asked": task.config.shard_size, "source": stamp, "marks": _has_marks(stamp)})


def _update(task: Assignment, listing: dict, stamp: dict) -> Callable[[], None]:
    """Compares the corpus with its listing; returns the update of the listing.

    Raises:
        UserError: there are changes, and `task.update` is not set.
    """
    log.say(f"  {task.title}: the source was modified since it was listed; looking for changes")
    plan = Plan(folder=task.out / "plan", items=listing["items"], shards=listing["shards"], cut=task.cut)

    def hashes(shard: int) -> dict[str, int | None] | None:
        table = update.labelled(task.out, task.table, shard)
        return None if table is None else {row["key"]: row["image_hash"] for row in table}

    new_shards = _NewShards(plan, listing["shard_size"], write=task.update)
    changes = compare(task.source, plan, hashes, new_shards.add)
    if changes and not task.update:
        raise UserError(f"--source: images changed since they were listed for --out {task.out}: "
                        f"{changes.describe()}; add --update to label only the new and changed ones (masks "
                        "and rows of missing ones are removed), or choose another --out")
    new_shards.flush()
    replaced = len(changes.changed) + len(changes.gone)
    items = listing["items"] + new_shards.items - replaced
    if not items:
        raise UserError("--source: no image is left in it; choose another --out")
    if changes:
        log.say(f"  {task.title}: {changes.describe()}")
        _say_passed(task)
    elif changes.touched:
        log.say(f"  {task.title}: files were touched, but their content is unchanged: {changes.touched}")

    def carry_out() -> None:
        update.begin(task.out, changes.edits,
                     listing | {"items": items, "shards": new_shards.shards, "source": stamp})
        update.finish(task.out, task.table)

    return carry_out


class _NewShards:
    """Writer of listings of new shards after the existing ones; they take effect with `listing.json`."""

    def __init__(self, plan: Plan, size: int, *, write: bool):
        self._folder, self._size, self._write = plan.folder, size, write
        self._waiting: list[Item] = []
        self.shards, self.items = plan.shards, 0
        if write:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes listings of an update that was interrupted before it took effect."""
        for path in sorted(self._folder.glob("listing-*.parquet")):
            if path >= listing_path(self._folder, self.shards):
                path.unlink()

    def add(self, item: Item) -> None:
        """Lists an image."""
        self.items += 1
        if self._write:
            self._waiting.append(item)
            if len(self._waiting) == self._size:
                self.flush()

    def flush(self) -> None:
        """Writes the last, incomplete shard."""
        if self._waiting:
            table = map(rows.listing_row, self._waiting)
            rows.write(listing_path(self._folder, self.shards), table, rows.LISTING)
            self.shards, self._waiting = self.shards + 1, []


def _require_same_source(task: Assignment, listing: dict, stamp: dict) -> None:
    """Rejects another source, another shard size, and changes of a source whose images have no marks.

    Raises:
        UserError: names the difference.
    """
    recorded, current = listing["source"], stamp
    if listing.get("marks"):
        # A longer list of archives is the same corpus, grown.
        names = ("kind", "root", "folders") if stamp["kind"] == "tars" else ("kind", "path", "root")
        recorded, current = ({name: side.get(name) for name in names} for side in (recorded, current))
    else:
        current = {name: value for name, value in current.items()
                   if name in recorded or recorded.get("kind") != current["kind"]}
    fingerprint.require_same(task.out, {"source": recorded, "shard_size": listing["asked"]},
                             {"source": current, "shard_size": task.config.shard_size})


def _is_moved(recorded: dict, current: dict) -> bool:
    """True for the samples of a data set that has another root since they were listed."""
    return (recorded.get("keys") is not None and recorded["keys"] == current.get("keys")
            and recorded["digest"] != current["digest"])


def _is_same(recorded: dict, current: dict) -> bool:
    """True if a corpus is unchanged; earlier versions recorded fewer fields."""
    return all(current.get(name) == value for name, value in recorded.items())


def _has_marks(stamp: dict) -> bool:
    """True if changes of single images can be detected in this kind of source."""
    return stamp["kind"] != "samples"


def _say_passed(task: Assignment) -> None:
    line = task.source.skipped.line()
    if line:
        log.say(f"  {task.title}: {line}")
