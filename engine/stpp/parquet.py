"""Parquet tables; the one module that imports pyarrow, lazily.

A table is described by its column types by name: "string", "int64", "list<int64>", "bool", ...
"""

import io
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO

from stpp import files
from stpp.errors import UserError

ROWS_PER_GROUP = 8192


def pyarrow() -> ModuleType:
    """The pyarrow package with `pyarrow.parquet` loaded.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"tables need pyarrow ({error}); install it with `pip install pyarrow`") from error
    return pyarrow


def compute() -> ModuleType:
    """The `pyarrow.compute` module."""
    import pyarrow.compute

    return pyarrow.compute


def schema(columns: Mapping[str, str], required: Collection[str] = ()):
    """Arrow schema of a table; columns that are not `required` are nullable."""
    pa = pyarrow()
    types = {"list<int64>": pa.list_(pa.int64()), "bool": pa.bool_()}
    return pa.schema([pa.field(name, types.get(kind) or getattr(pa, kind)(), nullable=name not in required)
                      for name, kind in columns.items()])


class TableWriter:
    """Writes rows one at a time in groups of a few thousand, so memory does not grow with the table."""

    def __init__(self, file: IO[bytes], columns: Mapping[str, str], required: Collection[str] = ()):
        self._pa, self._schema = pyarrow(), schema(columns, required)
        self._writer = self._pa.parquet.ParquetWriter(file, self._schema)
        self._rows: list[dict] = []

    def add(self, row: dict) -> None:
        """Appends a row; missing columns are null."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, kind, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def write(path: Path, rows: Iterable[dict], columns: Mapping[str, str]) -> None:
    """Writes rows as a Parquet file, atomically and reproducibly."""
    with files.atomic(path) as file:
        _write(file, rows, columns)


def encoded(rows: Iterable[dict], columns: Mapping[str, str]) -> bytes:
    """Rows as the bytes of a Parquet file."""
    file = io.BytesIO()
    _write(file, rows, columns)
    return file.getvalue()


def read(path: Path, columns: Iterable[str] | None = None, *, limit: int | None = None) -> list[dict]:
    """Rows of a Parquet file.

    Args:
        columns: columns to read; missing ones are ignored; None: all.
        limit: number of rows to read from the start; None: all.

    Raises:
        UserError: the file is missing or damaged.
    """
    pa = pyarrow()
    try:
        with pa.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in names if name in columns]
            if limit is None:
                return file.read(wanted).to_pylist()
            batch = next(file.iter_batches(batch_size=limit, columns=wanted), None)
            return [] if batch is None else batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _write(file: IO[bytes], rows: Iterable[dict], columns: Mapping[str, str]) -> None:
    with TableWriter(file, columns) as writer:
        for row in rows:
            writer.add(row)
