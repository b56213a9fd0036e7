"""The index on disk: index.json, and index.parquet as an in-memory mapping of rows."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from stpp import parquet
from stpp.dataset.check import Checked
from stpp.errors import UserError

FORMAT, VERSION = "stpp-index", 4
_OUTSIDE = re.compile(r"(^|/)\.\.(/|$)|^/|\x00|\n")


_COLUMNS = {"key": "string", "image": "string", "mask": "string", "converted": "string", "width": "int32",
            "height": "int32", "orientation": "int8", "plain": "bool", "format": "string",
            "colours": "string", "alpha": "bool", "bits": "int8", "used_bits": "int8",
            "class_pixels": "list<int64>", "bytes": "int64", "mtime_ns": "int64", "mask_bytes": "int64",
            "mask_mtime_ns": "int64", "listed": "string"}
_REQUIRED = _COLUMNS.keys() - {"mask", "converted", "class_pixels", "mask_bytes", "mask_mtime_ns", "listed"}
_OF_TASK = ("key", "image", "mask", "bytes", "mtime_ns", "mask_bytes", "mask_mtime_ns", "listed")


class IndexWriter:
    """Writes rows one at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._table = parquet.TableWriter(file, _COLUMNS, _REQUIRED)

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        self._table.__exit__(*raised)

    def add(self, checked: list[Checked]) -> None:
        """Appends rows."""
        for image in checked:
            task = {name: getattr(image.task, name) for name in _OF_TASK}
            found = {name: getattr(image, name) for name in ("converted", "used_bits", "class_pixels")}
            self._table.add(task | found | image.reading._asdict())


class EntryTable(Mapping):
    """Mapping from image path to entry; entries are created on access."""

    def __init__(self, columns: dict, entry: type) -> None:
        self._columns, self._entry = columns, entry
        self._position = {image: i for i, image in enumerate(columns["image"])}

    def __getitem__(self, image: str):
        i = self._position[image]
        return self._entry(**{name: _value(column[i]) for name, column in self._columns.items()})

    def having(self, name: str) -> list[str]:
        """Paths of the images with a value in a text column; creates no entries."""
        return [image for image, value in zip(self._columns["image"], self._columns[name], strict=True)
                if value is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(self._position)

    def __len__(self) -> int:
        return len(self._position)

    def __contains__(self, image: object) -> bool:
        return image in self._position


def read(path: Path, entry: type, *, rows: int, classes: int) -> EntryTable:
    """Reads index.parquet.

    Args:
        path: the file.
        entry: dataclass of a row; its fields are the columns.
        rows: expected number of rows.
        classes: expected length of class_pixels.

    Raises:
        UserError: missing, damaged, of another format, or with paths outside the root. Names the file.
    """
    pa = parquet.pyarrow()
    problem = f"{path}: the index is damaged ({{}}); run `stpp prepare` again"
    try:
        with pa.parquet.ParquetFile(path) as file:
            if not file.schema_arrow.equals(parquet.schema(_COLUMNS, _REQUIRED)):
                raise UserError(problem.format("its columns are not those of an index"))
            if file.metadata.num_rows != rows:
                raise UserError(problem.format(f"{file.metadata.num_rows} rows instead of {rows}"))
            table = file.read()
        table.validate(full=True)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(problem.format("the file is missing")) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(problem.format(" ".join(str(error).split())[:200])) from error
    wrong = _wrong(table, classes)
    if wrong:
        raise UserError(problem.format(wrong))
    nullable = ("class_pixels", "mask_bytes", "mask_mtime_ns")
    columns = {
        name: table.column(name) if name in nullable else _plain(table.column(name))
        for name in table.column_names
    }
    result = EntryTable(columns, entry)
    if len(result) != rows:
        raise UserError(problem.format("an image is listed twice"))
    return result


def _plain(column) -> Sequence:
    """Text columns as Python strings, which are looked up often; numbers as a compact NumPy array."""
    return column.to_pylist() if str(column.type) == "string" else column.to_numpy()


def _value(value):
    return value.as_py() if hasattr(value, "as_py") else value.item() if hasattr(value, "item") else value


def _wrong(table, classes: int) -> str | None:
    """Content that no valid index can have."""
    pc = parquet.compute()
    for field in table.schema:
        if not field.nullable and table.column(field.name).null_count:
            return f"empty values in {field.name}"
    for name in ("key", "image", "mask", "converted", "listed"):
        for path in table.column(name).to_pylist():
            if path is not None and (not path or _OUTSIDE.search(path)):
                return f"a {name} outside its folder: {path[:80]!r}"
    for name in ("width", "height"):
        if table.num_rows and pc.min(table.column(name)).as_py() < 1:
            return f"a {name} below 1"
    turns = table.column("orientation")
    if table.num_rows and not (1 <= pc.min(turns).as_py() and pc.max(turns).as_py() <= 8):
        return "an orientation that is not 1 to 8"
    pixels = table.column("class_pixels")
    lengths = pc.list_value_length(pixels)
    if pc.any(pc.not_equal(lengths, classes)).as_py():
        return f"class_pixels not of length {classes}"
    if (
        not pc.equal(pc.is_valid(pixels),
                     pc.is_valid(table.column("mask"))).combine_chunks().to_pylist().count(False)
        == 0
    ):
        return "class_pixels without a mask, or a mask without them"
    return None


def read_json(out: Path, name: str = "index.json") -> dict | None:
    """Validated content of out/index.json, or of another file of its format; None if it does not exist.

    Raises:
        UserError: unreadable, of another program, or damaged.
    """
    path = out / name
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an index ({error})") from error
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if (
            isinstance(value, dict)
            and value.get("format") == FORMAT
            and isinstance(value.get("version"), int)
        ):
            if value["version"] != VERSION or _well_formed(value):
                return value
    raise UserError(f"{path}: not an index of this program, or damaged; remove it, or choose another folder")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _well_formed(value: dict) -> bool:
    """True if index.json has the content that this version writes."""
    texts = all(isinstance(value.get(name), str) for name in ("root", "layout", "fingerprint", "contents"))
    names, counts, settings = value.get("classes"), value.get("counts"), value.get("settings")
    return (
        texts
        and os.path.isabs(value["root"])
        and isinstance(names, list)
        and 2 <= len(names) <= 255
        and all(isinstance(name, str) for name in names)
        and isinstance(counts, dict)
        and all(type(counts.get(name)) is int for name in ("images", "masks", "converted"))
        and isinstance(settings, dict)
        and isinstance(settings.get("exif"), bool)
        and isinstance(folders := settings.get("unlabelled", []), list)
        and all(isinstance(folder, str) and os.path.isabs(folder) for folder in folders)
        and _are_texts(value.get("warnings"))
        and isinstance(twins := value.get("twins"), list)
        and all(map(_are_texts, twins))
    )
