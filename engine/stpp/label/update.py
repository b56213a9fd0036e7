"""Atomic update of a labelling to a changed corpus, safe against interruption.

The edits are written first (`plan/update.parquet`, then `plan/update.json`); every later call finishes them
before anything else, and each step may be repeated. Valid masks are kept; new and changed images go to new
shards; masks and rows of changed and missing images are removed.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from stpp import files
from stpp.errors import UserError
from stpp.label import fingerprint, rows
from stpp.label.changes import Edit
from stpp.label.plan import listing_path, part_path
from stpp.label.shards import Markers, marker_of
from stpp.label.sinks import repacked

CONCLUSIONS = ("summary.json", "failed.parquet", "reliability.parquet", "reliable_ids.txt",
               "unreliable_ids.txt")
"""Files about the whole corpus; removed until all of it is labelled again."""


def begin(out: Path, edits: Iterable[Edit], listing: dict) -> None:
    """Records an update that `finish` carries out.

    Args:
        listing: new content of `plan/listing.json`.
    """
    table = ({"shard": edit.shard, "dropped": edit.dropped, **rows.listing_row(edit.item)}
             for edit in sorted(edits, key=lambda edit: edit.shard))
    rows.write(out / "plan" / "update.parquet", table, rows.EDITS)
    files.write_json(out / "plan" / "update.json", listing)


def finish(out: Path, table: str) -> None:
    """Carries out a recorded update, if there is one.

    Args:
        table: folder of the rows, "labels" or "scores".

    Raises:
        UserError: the record cannot be read.
        OSError: the output cannot be written.
    """
    intent = out / "plan" / "update.json"
    try:
        listing = json.loads(intent.read_text(encoding="utf-8"))
    except FileNotFoundError:
        (out / "plan" / "update.parquet").unlink(missing_ok=True)  # not recorded whole, or carried out
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{intent}: cannot be read ({error}); choose another --out") from None
    edits = rows.read(out / "plan" / "update.parquet")
    for shard, of_shard in groupby(edits, key=lambda row: row["shard"]):
        _edit(out, table, shard, list(of_shard))
    if listing["shards"] > _shards(out) or any(row["dropped"] for row in edits):
        retract(out)
    files.write_json(out / "plan" / "listing.json", listing)
    begun = fingerprint.read(out)
    if begun is not None:
        fingerprint.write(out, begun["fingerprint"] | {"source": listing["source"]},
                          {"items": listing["items"], "shards": listing["shards"]},
                          begun.get("classes", ()), fingerprint.planned_for(begun))
    intent.unlink()
    files.sync_folder(intent.parent)
    (out / "plan" / "update.parquet").unlink()


def retract(out: Path) -> None:
    """Removes the files about the whole corpus, which are not true of a part."""
    for name in CONCLUSIONS:
        (out / name).unlink(missing_ok=True)


def _shards(out: Path) -> int:
    return json.loads((out / "plan" / "listing.json").read_text(encoding="utf-8"))["shards"]


def _edit(out: Path, table: str, shard: int, edits: list[dict]) -> None:
    """Carries out the edits of one shard; steps that are done are not changed."""
    dropped = {row["key"] for row in edits if row["dropped"]}
    moved = {row["key"]: row for row in edits if not row["dropped"]}
    place = ("file", "offset", "bytes")
    _rewrite(listing_path(out / "plan", shard), dropped, moved, rows.LISTING, (*place, "mark"))
    markers, planned = Markers(out), part_path(out / "plan", shard)
    old = labelled(out, table, shard)
    if old is None:
        if markers.done(shard):
            markers.remove(shard)
        planned.unlink(missing_ok=True)  # sizes may have changed with the content
    else:
        if planned.exists():
            _rewrite(planned, dropped, moved, rows.PLAN, place)
        if dropped:
            _drop(out, table, shard, markers, [row for row in old if row["key"] not in dropped], dropped)
    # An interrupted shard may have masks of images whose content has changed.
    for key in sorted(dropped | moved.keys() if old is None else dropped):
        _remove_mask(out / "masks", key)


def labelled(out: Path, table: str, shard: int) -> list[dict] | None:
    """Reads the rows of a finished shard; None if it is not finished, or its rows are lost."""
    if Markers(out).done(shard):
        with suppress(UserError):
            return rows.read(rows.part(out, table, shard))
    return None


def _drop(out: Path, table: str, shard: int, markers: Markers, kept: list[dict], dropped: set[str]) -> None:
    """Removes images from a finished shard: from its archive, its rows, then its marker."""
    archives = [repacked(out, shard, dropped)] if markers.read(shard)["files"] else []
    part = rows.part(out, table, shard)
    data = rows.encoded(kept, rows.TABLES[table])
    with files.atomic(part) as file:
        file.write(data)
    if archives and hasattr(os, "sync"):
        os.sync()  # the archive was a plain write
    markers.write(shard, marker_of(kept, part.name, data, archives))


def _rewrite(path: Path, dropped: set[str], moved: dict[str, dict], columns: dict[str, str],
             place: tuple[str, ...]) -> None:
    """Removes dropped rows from a table of the plan, and sets the `place` columns of moved ones."""
    table = rows.read(path)
    kept = [row | {name: moved[row["key"]][name] for name in place if row["key"] in moved}
            for row in table if row["key"] not in dropped]
    if kept != table:
        rows.write(path, kept, columns)


def _remove_mask(folder: Path, key: str) -> None:
    """Removes a mask, and the folders that it leaves empty."""
    path = folder / f"{key}.png"
    path.unlink(missing_ok=True)
    with suppress(OSError):
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent).rmdir()
