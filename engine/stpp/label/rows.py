"""Tables of a labelling: their columns, and the rows of images."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from stpp.images.items import Item
from stpp.images.planning import Planned
from stpp.parquet import encoded as encoded
from stpp.parquet import read as read
from stpp.parquet import write as write

PLACE = {"key": "string", "source": "string", "file": "string", "offset": "int64", "bytes": "int64",
         "error": "string"}
"""Columns of an item: where its bytes lie."""
LISTING = {**PLACE, "mark": "string"}
"""Columns of `plan/listing-*.parquet`: the items of a shard as the source yields them."""
PLAN = {"position": "int64", **PLACE, "width": "int32", "height": "int32", "orientation": "int8",
        "plain": "bool", "format": "string", "colours": "string", "alpha": "bool", "bits": "int8",
        "batch": "int32"}
"""Columns of `plan/part-*.parquet`: the items of a shard in the order that they are labelled."""
EDITS = {"shard": "int32", "dropped": "bool", **LISTING}
"""Columns of `plan/update.parquet`: items that a shard loses, or whose place changed."""
_IMAGE = {"key": "string", "source": "string", "status": "string", "error": "string", "width": "int32",
          "height": "int32"}
LABELS = {**_IMAGE, "mean_confidence": "float64", "ignored_fraction": "float64",
          "class_pixels": "list<int64>", "confidence_map": "binary", "size": "int64", "crc": "int64",
          "teacher": "string", "image_hash": "int64"}
"""Columns of `labels/part-*.parquet` and `failed.parquet`; `image_hash` is `content_hash` of the image."""
SCORES = {**_IMAGE, "reliability": "float64", "class_pixels": "list<int64>", "teacher": "string",
          "image_hash": "int64"}
"""Columns of `scores/part-*.parquet`; `class_pixels` where images are chosen by class."""
RELIABILITY = {"key": "string", "reliability": "float64", "reliable": "bool"}
"""Columns of `reliability.parquet`."""
TABLES = {"labels": LABELS, "scores": SCORES}
"""Columns of a labelling's table, by the folder of its parts."""


def listing_row(item: Item) -> dict:
    """The row of an item in a listing."""
    return {name: getattr(item, name) for name in LISTING}


def part(out: Path, table: str, shard: int) -> Path:
    """The file of a shard's rows."""
    return out / table / f"part-{shard:06d}.parquet"


def read_parts(folder: Path) -> Iterator[dict]:
    """The rows of `part-*.parquet` in a folder, part after part."""
    for path in sorted(folder.glob("part-*.parquet")):
        yield from read(path)


def good(one: Planned, teacher: str) -> dict:
    """The beginning of the row of an image that was labelled."""
    return {"key": one.item.key, "source": one.item.source, "status": "ok", "error": None,
            "width": one.reading and one.reading.width, "height": one.reading and one.reading.height,
            "teacher": teacher}


def bad(one: Planned, error: str, teacher: str) -> dict:
    """The row of an image that could not be labelled."""
    return good(one, teacher) | {"status": "bad", "error": error}


def checksum(data: bytes, before: int = 0) -> int:
    """CRC-32, as the tables hold it; of bytes that follow others, if `before` is theirs."""
    return zlib.crc32(data, before)
