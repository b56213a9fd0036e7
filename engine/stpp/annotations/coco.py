"""COCO's JSON of objects in images: `images`, `annotations` with polygons or run lengths, `categories`.

A file is read once from its beginning to its end, to learn which bytes speak of which image; its shapes are
read image by image, from those bytes, when the image is looked at.
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
    """An image, as the file lists it."""

    name: str
    """`file_name`."""
    size: tuple[int, int] | None
    """(width, height), if it is there."""
    parts: bytes
    """Where its annotations lie: pairs of first byte and length, int64; empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a file lists."""

    categories: dict[int, str]
    """Names by id, in the order of the ids."""
    images: tuple[Listed, ...]


def listing(path: Path) -> Listing:
    """Reads a whole file; again only when it has changed.

    Raises:
        UserError: it is no such file; names it, and the annotation.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _listing(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _listing(path: Path, *_stamp: int) -> Listing:
    found = _Found(path)
    for element in json_stream.elements(path):
        found.add(element)
    return found.listing()


@dataclass
class _Found:
    path: Path
    categories: dict[int, str] = field(default_factory=dict)
    images: list[tuple[str, tuple[int, int] | None]] = field(default_factory=list)
    numbers: dict[int | str, int] = field(default_factory=dict)
    """Image id -> a number, in the order in which ids were met."""
    listed: dict[int, int] = field(default_factory=dict)
    """That number -> place in `images`."""
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
                                f"{'no number' if type(key) is not int else 'taken'}")
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
            raise UserError(f"{self.path}: is no COCO JSON: it has no list `{lacking}`")
        owners = np.frombuffer(self._owner, dtype=np.int64)
        unlisted = np.flatnonzero(~np.isin(owners, list(self.listed)))
        if unlisted.size:
            ids = list(self.numbers)
            raise UserError(f"{self.path}: annotations[{unlisted[0]}]: its image_id "
                            f"{ids[owners[unlisted[0]]]!r} is none of `images` ({unlisted.size} such "
                            "annotations)")
        order = np.argsort(owners, kind="stable")
        places = np.column_stack((np.frombuffer(self._offset, dtype=np.int64),
                                  np.frombuffer(self._bytes, dtype=np.int64)))[order]
        ends = np.searchsorted(owners[order], np.arange(len(self.numbers)), side="right")
        starts = np.concatenate(([0], ends[:-1]))
        images = tuple(Listed(*self.images[place], places[starts[number] : ends[number]].tobytes())
                       for number, place in self.listed.items())
        return Listing(categories=dict(sorted(self.categories.items())), images=images)


def read(path: str | os.PathLike, parts: bytes, size: tuple[int, int] | None) -> Annotated:
    """The shapes of one image.

    Args:
        parts, size: of `Listed`.
    """
    shapes, problems = [], []
    for value in _values(path, parts):
        where = f"annotation {_shown(value.get('id'))}"
        label = value.get("category_id")
        if type(label) is not int:
            problems.append(f"{where}: has no category_id that is a number")
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
    found = value.get("segmentation")
    if isinstance(found, dict):
        size, counts = found.get("size"), found.get("counts")
        if not isinstance(size, list) or [type(one) for one in size] != [int, int]:
            raise ValueError("its run lengths have no size [height, width]")
        if isinstance(counts, str):
            return Runs(runs.from_text(counts), tuple(size)), None
        if not isinstance(counts, list) or not all(type(one) is int and 0 <= one < 1 << 40 for one in counts):
            raise ValueError("its run lengths have no counts, a list of numbers or a text")
        return Runs(np.array(counts, dtype=np.int64), tuple(size)), None
    if isinstance(found, list) and found:
        if not all(isinstance(one, list) for one in found):
            raise ValueError("its segmentation is no list of polygons [[x, y, x, y, ...], ...]")
        return Outline(tuple(map(ring, found))), None
    return _box(value.get("bbox")), "it has no polygon and no mask"


def _box(value: object) -> Region | None:
    """The box [x, y, width, height] of an annotation, whose object lies somewhere in it."""
    try:
        (x, y), (wide, high) = ring(value)
    except ValueError:
        return None
    return Outline((ring([x, y, x + wide, y, x + wide, y + high, x, y + high]),)) if wide > 0 < high else None


def _id(value: dict, name: str, where: str) -> int | str:
    found = value.get(name)
    if type(found) not in (int, str):
        raise UserError(f"{where}: has no {name}")
    return found


def _size(value: dict, where: str) -> tuple[int, int] | None:
    found = value.get("width"), value.get("height")
    if found in ((None, None), (0, 0)):
        return None
    if any(type(one) is not int or not 0 < one < 1 << 31 for one in found):
        raise UserError(f"{where}: its width and height are no numbers of pixels")
    return found


def _shown(value: object) -> str:
    return str(value)[:40] if isinstance(value, (int, str)) else "without an id"
