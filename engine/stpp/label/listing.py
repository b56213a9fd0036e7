"""Listing a corpus into the plan, and bringing the listing up to date when the corpus has changed."""

import json
from pathlib import Path

from stpp import files, log
from stpp.errors import UserError
from stpp.images.items import Item
from stpp.label import fingerprint, rows, update
from stpp.label.assignment import Assignment
from stpp.label.changes import compare
from stpp.label.plan import Plan, listing_path, make
from stpp.label.sinks import sweep


def read(out: Path) -> dict | None:
    """The content of `plan/listing.json`; None where nothing is listed.

    Raises:
        UserError: damaged.
    """
    path = out / "plan" / "listing.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --out") from None


def ensure(task: Assignment) -> None:
    """Lists the source into the plan, or checks that the listing is of this source as it is now.

    Raises:
        UserError: there is no image; another source; or images changed, and `task.update` is not set.
        OSError: the output cannot be written.
    """
    update.finish(task.out, task.table)
    stamp, listing = task.source.stamp(), read(task.out)
    sweep(task.out)
    if listing is None:
        _list(task, stamp)
        return
    _require_same_source(task, listing, stamp)
    if not _is_same(listing["source"], stamp):
        _follow(task, listing, stamp)


def _list(task: Assignment, stamp: dict) -> None:
    log.say(f"  {task.title}: listing the images")
    try:
        (task.out / "plan").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out {task.out}: is or lies in a file; choose a folder") from None
    made = make(task.source, task.out / "plan", shard_size=task.config.shard_size)
    _say_passed(task)
    files.write_json(task.out / "plan" / "listing.json",
                     made | {"asked": task.config.shard_size, "source": stamp, "marks": _has_marks(stamp)})


def _follow(task: Assignment, listing: dict, stamp: dict) -> None:
    """Compares the corpus with its listing, and takes the changes into it if that is wanted.

    Raises:
        UserError: there are changes, and it is not wanted.
    """
    log.say(f"  {task.title}: the source was touched since it was listed, looking for what changed")
    plan = Plan(folder=task.out / "plan", items=listing["items"], shards=listing["shards"], cut=task.cut)

    def hashes(shard: int) -> dict[str, int | None] | None:
        table = update.labelled(task.out, task.table, shard)
        return None if table is None else {row["key"]: row["image_hash"] for row in table}

    fresh = _NewShards(plan, listing["shard_size"], write=task.update)
    changes = compare(task.source, plan, hashes, fresh.add)
    if changes and not task.update:
        raise UserError(f"--source: images are not those that were listed for --out {task.out}: "
                        f"{changes.words()}; add --update to label just the new and changed ones (masks and "
                        "rows of those that are gone are removed), or choose another --out")
    fresh.flush()
    gone = len(changes.changed) + len(changes.gone)
    items = listing["items"] + fresh.items - gone
    if not items:
        raise UserError("--source: there is no image in it any more; choose another --out")
    if changes:
        log.say(f"  {task.title}: {changes.words()}")
        _say_passed(task)
    elif changes.touched:
        log.say(f"  {task.title}: files were touched, but hold what they held: {changes.touched}")
    update.begin(task.out, changes.edits, listing | {"items": items, "shards": fresh.shards, "source": stamp})
    update.finish(task.out, task.table)


class _NewShards:
    """Lists images behind the shards that are there, from which on they count once the listing says so."""

    def __init__(self, plan: Plan, size: int, *, write: bool):
        self._folder, self._size, self._write = plan.folder, size, write
        self._waiting: list[Item] = []
        self.shards, self.items = plan.shards, 0
        if write:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Of an update that was interrupted before it was decided on."""
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
        """Writes the last shard."""
        if self._waiting:
            table = map(rows.listing_row, self._waiting)
            rows.write(listing_path(self._folder, self.shards), table, rows.LISTING)
            self.shards, self._waiting = self.shards + 1, []


def _require_same_source(task: Assignment, listing: dict, stamp: dict) -> None:
    """Refuses another source, another size of shards, and changes of a source whose images have no marks.

    Raises:
        UserError: names the difference.
    """
    theirs, ours = listing["source"], stamp
    if listing.get("marks"):
        # A longer row of archives is the same corpus, grown.
        names = ("kind", "root", "folders") if stamp["kind"] == "tars" else ("kind", "path", "root")
        theirs, ours = ({name: one.get(name) for name in names} for one in (theirs, ours))
    else:
        ours = {name: ours[name] for name in ours if name in theirs or theirs.get("kind") != ours["kind"]}
    fingerprint.require_same(task.out, {"source": theirs, "shard_size": listing["asked"]},
                             {"source": ours, "shard_size": task.config.shard_size})


def _is_same(theirs: dict, ours: dict) -> bool:
    """Whether a corpus is as it was; versions before told less of it."""
    return all(ours.get(name) == value for name, value in theirs.items())


def _has_marks(stamp: dict) -> bool:
    """Whether the images of such a source can be told from themselves after a change."""
    return stamp["kind"] != "samples"


def _say_passed(task: Assignment) -> None:
    line = task.source.skipped.line()
    if line:
        log.say(f"  {task.title}: {line}")
