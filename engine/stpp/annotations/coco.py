"""COCO JSON: `images`, `annotations` with polygons or run lengths, `categories`.

A file is scanned once to map byte ranges of annotations to images; each image's shapes are then parsed from
those ranges on demand.
"""

import functools
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stpp.annotations import json_stream, runs
from stpp.annotations.regions import Outline, Region, Runs, ring
from stpp.annotations.shapes import Annotated, Shape
from stpp.errors import UserError


class Listed(NamedTuple):
    """An image entry of the file."""

    name: str
    """`file_name`."""
    size: tuple[int, int] | None
    """(width, height); None if the file omits them."""
    parts: bytes
    """Byte ranges of its annotations: pairs of first byte and length, int64; empty without annotations."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Categories and images of a file."""

    categories: dict[int, str]
    """Names by category id, sorted by id."""
    images: tuple[Listed, ...]


def listing(path: Path) -> Listing:
    """Indexes a whole file; cached until the file changes.

    Raises:
        UserError: not a COCO file; names the file and the annotation.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _listing(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _listing(path: Path, *_stamp: int) -> Listing:
    builder = _ListingBuilder(path)
    for element in json_stream.elements(path):
        builder.add(element)
    return builder.listing()


@dataclass
class _ListingBuilder:
    path: Path
    categories: dict[int, str] = field(default_factory=dict)
    images: list[tuple[str, tuple[int, int] | None]] = field(default_factory=list)
    numbers: dict[int | str, int] = field(default_factory=dict)
    """Image id -> image number, in order of first occurrence."""
    listed: dict[int, int] = field(default_factory=dict)
    """Image number -> position in `images`."""
    counts: dict[str, int] = field(default_factory=lambda: {"images": 0, "annotations": 0, "categories": 0})

    def __post_init__(self):
        self._owner, self._offset, self._bytes = array("q"), array("q"), array("q")

    def add(self, element: json_stream.Element) -> None:
        if element.name not in self.counts:
            return
        where = f"{self.path}: {element.name}[{self.counts[element.name]}]"
        self.counts[element.name] += 1
        if not isinstance(element.value, dict):
            raise UserError(f"{where}: expected an object {{...}}")
        if element.name == "annotations":
            self._owner.append(self._number(_id(element.value, "image_id", where)))
            self._offset.append(element.offset)
            self._bytes.append(element.bytes)
            return
        key = _id(element.value, "id", where)
        name = element.value.get("name" if element.name == "categories" else "file_name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: has no {'name' if element.name == 'categories' else 'file_name'}")
        if element.name == "categories":
            if type(key) is not int or key in self.categories:
                raise UserError(f"{where}: its id {key!r} is "
                                f"{'not a number' if type(key) is not int else 'not unique'}")
            self.categories[key] = name.strip()
            return
        number = self._number(key)
        if number in self.listed:
            raise UserError(f"{where}: another image has its id {key!r}")
        self.listed[number] = len(self.images)
        self.images.append((name, _size(element.value, where)))

    def _number(self, key: int | str) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def listing(self) -> Listing:
        if not self.counts["images"] or not self.categories:
            lacking = "images" if not self.counts["images"] else "categories"
            raise UserError(f"{self.path}: not a COCO JSON: it has no list `{lacking}`")
        owners = np.frombuffer(self._owner, dtype=np.int64)
        unlisted = np.flatnonzero(~np.isin(owners, list(self.listed)))
        if unlisted.size:
            ids = list(self.numbers)
            raise UserError(f"{self.path}: annotations[{unlisted[0]}]: its image_id "
                            f"{ids[owners[unlisted[0]]]!r} is not in `images` ({unlisted.size} annotations "
                            "of this kind)")
        order = np.argsort(owners, kind="stable")
        places = np.column_stack((np.frombuffer(self._offset, dtype=np.int64),
                                  np.frombuffer(self._bytes, dtype=np.int64)))[order]
        ends = np.searchsorted(owners[order], np.arange(len(self.numbers)), side="right")
        starts = np.concatenate(([0], ends[:-1]))
        images = tuple(Listed(*self.images[place], places[starts[number] : ends[number]].tobytes())
                       for number, place in self.listed.items())
        return Listing(categories=dict(sorted(self.categories.items())), images=images)


def read(path: str | os.PathLike, parts: bytes, size: tuple[int, int] | None) -> Annotated:
    """Reads the shapes of one image.

    Args:
        path: the COCO file.
        parts, size: from its `Listed`.
    """
    shapes, problems = [], []
    for value in _values(path, parts):
        where = f"annotation {_shown(value.get('id'))}"
        label = value.get("category_id")
        if type(label) is not int:
            problems.append(f"{where}: has no numeric category_id")
            continue
        try:
            region, doubt = _region(value)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        shapes.append(Shape(where, label, region, value.get("iscrowd") in (1, True), doubt))
    return Annotated(size, shapes, problems)


def _values(path: str | os.PathLike, parts: bytes) -> Iterator[dict]:
    places = np.frombuffer(parts, dtype=np.int64).reshape(-1, 2)
    try:
        with open(path, "rb") as file:
            for offset, length in places.tolist():
                file.seek(offset)
                value = json_stream.loads(file.read(length))
                if not isinstance(value, dict):
                    raise ValueError("expected an object")
                yield value
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: changed while it was read, or is damaged ({error}); run the same command "
                        "again") from None


def _region(value: dict) -> tuple[Region | None, str | None]:
    segmentation = value.get("segmentation")
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
            raise ValueError("its run lengths have no size [height, width]")
        if isinstance(counts, str):
            return Runs(runs.from_text(counts), tuple(size)), None
        if not isinstance(counts, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in counts):
            raise ValueError("its run lengths have no counts: expected a list of numbers or a string")
        return Runs(np.array(counts, dtype=np.int64), tuple(size)), None
    if isinstance(segmentation, list) and segmentation:
        if not all(isinstance(polygon, list) for polygon in segmentation):
            raise ValueError("its segmentation is not a list of polygons [[x, y, x, y, ...], ...]")
        return Outline(tuple(map(ring, segmentation))), None
    return _box(value.get("bbox")), "it has no polygon and no mask"


def _box(value: object) -> Region | None:
    """Region of an annotation's box [x, y, width, height], which contains the object."""
    try:
        (x, y), (wide, high) = ring(value)
    except ValueError:
        return None
    return Outline((ring([x, y, x + wide, y, x + wide, y + high, x, y + high]),)) if wide > 0 < high else None


def _id(value: dict, name: str, where: str) -> int | str:
    identifier = value.get(name)
    if type(identifier) not in (int, str):
        raise UserError(f"{where}: has no {name}")
    return identifier


def _size(value: dict, where: str) -> tuple[int, int] | None:
    size = value.get("width"), value.get("height")
    if size in ((None, None), (0, 0)):
        return None
    if any(type(side) is not int or not 0 < side < 1 << 31 for side in size):
        raise UserError(f"{where}: its width and height are not pixel counts")
    return size


def _shown(value: object) -> str:
    return str(value)[:40] if isinstance(value, (int, str)) else "without an id"
