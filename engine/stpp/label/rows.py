"""Tables of a labelling: columns, and rows of images."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from stpp.errors import UserError
from stpp.images.items import Item
from stpp.images.planning import Planned
from stpp.parquet import encoded as encoded
from stpp.parquet import read as read
from stpp.parquet import write as write

PLACE = {"key": "string", "source": "string", "file": "string", "offset": "int64", "bytes": "int64",
         "error": "string"}
"""Columns of an item's location."""
LISTING = {**PLACE, "mark": "string"}
"""Columns of `plan/listing-*.parquet`: the items of a shard in the order of the source."""
PLAN = {"position": "int64", **PLACE, "width": "int32", "height": "int32", "orientation": "int8",
        "plain": "bool", "format": "string", "colours": "string", "alpha": "bool", "bits": "int8",
        "batch": "int32"}
"""Columns of `plan/part-*.parquet`: the items of a shard in labelling order."""
EDITS = {"shard": "int32", "dropped": "bool", **LISTING}
"""Columns of `plan/update.parquet`: items removed from a shard, or with a new place."""
_IMAGE = {"key": "string", "source": "string", "status": "string", "error": "string", "width": "int32",
          "height": "int32"}
LABELS = {**_IMAGE, "mean_confidence": "float64", "ignored_fraction": "float64",
          "class_pixels": "list<int64>", "confidence_map": "binary", "size": "int64", "crc": "int64",
          "teacher": "string", "image_hash": "int64"}
"""Columns of `labels/part-*.parquet` and `failed.parquet`; `image_hash` is the image's `content_hash`."""
SCORES = {**_IMAGE, "reliability": "float64", "class_pixels": "list<int64>", "teacher": "string",
          "image_hash": "int64"}
"""Columns of `scores/part-*.parquet`; `class_pixels` only for a selection by class."""
RELIABILITY = {"key": "string", "reliability": "float64", "reliable": "bool"}
"""Columns of `reliability.parquet`."""
TABLES = {"labels": LABELS, "scores": SCORES}
"""Columns of the result table, by the folder of its parts."""


def listing_row(item: Item) -> dict:
    """Makes the row of an item in a listing."""
    return {name: getattr(item, name) for name in LISTING}


def item(row: dict) -> Item:
    """Makes the item of a row in a plan."""
    return Item(**{name: row[name] for name in PLACE if name != "error"})


def part(out: Path, table: str, shard: int) -> Path:
    """Path of a shard's rows."""
    return out / table / f"part-{shard:06d}.parquet"


def parts(out: Path, table: str) -> list[Path]:
    """Lists the parts of a table.

    Raises:
        UserError: the labelling is finished, and a part is missing.
    """
    present = sorted((out / table).glob("part-*.parquet"))
    listing = out / "plan" / "listing.json"
    if (out / "summary.json").exists() and listing.exists():
        try:
            shards = int(json.loads(listing.read_text(encoding="utf-8"))["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{listing}: cannot be read ({error}); label again with `--verify`") from None
        lost = [path for path in (part(out, table, shard) for shard in range(shards)) if path not in present]
        if lost:
            raise UserError(f"{lost[0]} is missing, so {out} is incomplete; label again with `--verify`")
    return present


def read_parts(out: Path, table: str) -> Iterator[dict]:
    """Yields the rows of a table, part after part.

    Raises:
        UserError: see `parts`.
    """
    for path in parts(out, table):
        yield from read(path)


def good(image: Planned, teacher: str) -> dict:
    """Makes the common columns of a labelled image's row."""
    reading = image.reading
    return {"key": image.item.key, "source": image.item.source, "status": "ok", "error": None,
            "width": reading and reading.width, "height": reading and reading.height, "teacher": teacher}


def bad(image: Planned, error: str, teacher: str) -> dict:
    """Makes the row of an image that could not be labelled."""
    return good(image, teacher) | {"status": "bad", "error": error}


def checksum(data: bytes, before: int = 0) -> int:
    """Computes the CRC-32 used in the tables; `before` is the checksum of preceding bytes."""
    return zlib.crc32(data, before)
