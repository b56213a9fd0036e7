"""Tables of labels and reliability: Parquet files, written whole, the same bytes for the same rows."""

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from stpp import files
from stpp.errors import UserError

LISTING = {"key": "string", "source": "string", "file": "string", "offset": "int64", "bytes": "int64", "error": "string"}
"""Columns of `plan/listing-*.parquet`: the items of a shard as the source yields them."""
PLAN = {"position": "int64", **LISTING, "width": "int32", "height": "int32", "orientation": "int8", "plain": "bool",
        "format": "string", "colours": "string", "alpha": "bool", "bits": "int8", "batch": "int32"}
"""Columns of `plan/part-*.parquet`: the items of a shard in the order that they are labelled."""
LABELS = {"key": "string", "source": "string", "status": "string", "error": "string", "width": "int32", "height": "int32",
          "mean_confidence": "float64", "ignored_fraction": "float64", "class_pixels": "list<int64>", "confidence_map": "binary",
          "size": "int64", "crc": "int64", "teacher": "string"}
"""Columns of `labels/part-*.parquet` and `failed.parquet`."""
SCORES = {"key": "string", "source": "string", "status": "string", "error": "string", "width": "int32", "height": "int32",
          "reliability": "float64", "teacher": "string"}
"""Columns of `scores/part-*.parquet`."""
RELIABILITY = {"key": "string", "reliability": "float64", "reliable": "bool"}
"""Columns of `reliability.parquet`."""
_GROUP = 8192


def write(path: Path, rows: Iterable[dict], columns: dict[str, str]) -> None:
    """Writes `rows` as a Parquet file, atomically, a few thousand at a time."""
    with files.atomic(path) as file:
        _write(file, rows, columns)


def encoded(rows: list[dict], columns: dict[str, str]) -> bytes:
    """`rows` as the bytes of a Parquet file."""
    import io

    file = io.BytesIO()
    _write(file, rows, columns)
    return file.getvalue()


def put(path: Path, data: bytes) -> None:
    """Writes what `encoded` made, atomically."""
    with files.atomic(path) as file:
        file.write(data)


def read(path: Path, columns: Iterable[str] | None = None) -> list[dict]:
    """The rows of a Parquet file.

    Args:
        columns: of those that are there, the ones to read; None: all.

    Raises:
        UserError: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        return file.read(None if columns is None else [name for name in file.schema_arrow.names if name in columns]).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def read_parts(folder: Path) -> Iterator[dict]:
    """The rows of `part-*.parquet` in a folder, part after part."""
    for path in sorted(folder.glob("part-*.parquet")):
        yield from read(path)


def checksum(data: bytes, before: int = 0) -> int:
    """CRC-32, as the tables hold it; of bytes that follow others, if `before` is theirs."""
    return zlib.crc32(data, before)


def _write(file: IO[bytes], rows: Iterable[dict], columns: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"list<int64>": pa.list_(pa.int64()), "bool": pa.bool_()}
    schema = pa.schema([(name, kinds.get(kind) or getattr(pa, kind)()) for name, kind in columns.items()])
    with pq.ParquetWriter(file, schema) as writer:
        group: list[dict] = []
        for row in rows:
            group.append(row)
            if len(group) == _GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
