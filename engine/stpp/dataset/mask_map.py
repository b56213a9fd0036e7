"""The mask map: translation of the values in a user's masks to class ids.

A map is a list of entries `STORED=CLASS`. STORED is an id (`7`), a range of ids (`1-150`), or a colour
(`#804080` or `128,64,128`); CLASS is a class's id or name, `ignore` (255), or, for a range of ids, a range of
equal length (`1-150=0-149`). Values that the map does not name are errors, except the id 255, which stays
255.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stpp.errors import UserError
from stpp.images.masks import IGNORE

MAX_ID = (1 << 16) - 1
"""Largest id in a PNG."""
_SHOWN = 5
MANY = 24
"""More unknown colours or ids than this in one mask indicate noise, not missing entries."""
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_HEX, _TRIPLE = re.compile(r"#([0-9a-fA-F]{6})"), re.compile(r"([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})")


@dataclass(frozen=True, eq=False)
class MaskMap:
    """A map made by `parse`."""

    stored: np.ndarray
    """int64 [K], ascending: ids, or colours as 65536 * red + 256 * green + blue."""
    classes: np.ndarray
    """int16 [K]: class ids, 255 is ignore."""
    in_colour: bool
    """True for a map of colours, False for a map of ids."""
    names_ignore: bool = False
    """True if an entry names the id 255; otherwise 255 stays 255."""

    def __call__(self, values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
        """Class ids of a mask.

        Args:
            values: ids from 0 to 65535, integer [H, W]; or colours, uint8 [H, W, 3].
            path: path of the mask, for the error.

        Returns:
            uint8 [H, W].

        Raises:
            UserError: an id or colour that the map does not name, with its pixel count.
        """
        if self.in_colour:
            red, green, blue = np.moveaxis(values.astype(np.int64), 2, 0)
            values = red << 16 | green << 8 | blue
            found = self.classes_of(values)
        else:
            found = self.classes_of(np.arange(MAX_ID + 1))[values]
        unknown = found < 0
        if unknown.any():
            raise self._refusal(values[unknown], path)
        return found.astype(np.uint8)

    def classes_of(self, stored: np.ndarray) -> np.ndarray:
        """Class ids of stored ids or colours, int16; -1 if not named."""
        place = np.searchsorted(self.stored, stored).clip(max=len(self.stored) - 1)
        return np.where(self.stored[place] == stored, self.classes[place], np.int16(-1))

    def _refusal(self, unknown: np.ndarray, path: str | os.PathLike) -> UserError:
        unnamed, counts = np.unique(unknown, return_counts=True)
        if len(unnamed) <= MANY:
            return UserError(f"{path}: {self._named(unnamed, counts)} not in the mask map; add each to "
                             "--data.mask-map, as a class or as ignore")
        kind = "colours" if self.in_colour else "ids"
        return UserError(f"{path}: {len(unnamed)} {kind} in {len(unknown)} pixels are not in the mask map: "
                         "soft edges or JPEG noise; save the mask as PNG without anti-aliasing, or replace "
                         f"them with the nearest of the map's {len(self.stored)} {kind} in an image editor")

    def _named(self, unnamed: np.ndarray, counts: np.ndarray) -> str:
        first = np.argsort(-counts, kind="stable")[:_SHOWN]
        shown = ", ".join(f"{self._name(unnamed[i])} in {counts[i]} pixels" for i in first)
        more = f" and {len(unnamed) - _SHOWN} more" * (len(unnamed) > _SHOWN)
        return f"{'colour' if self.in_colour else 'id'} {shown}{more}"

    def _name(self, stored: int) -> str:
        return f"#{stored:06x}" if self.in_colour else str(stored)


def parse(entries: Sequence[str], classes: Sequence[str]) -> MaskMap | None:
    """Parses the entries of a map; None if there are none.

    Args:
        entries: see the top of this file.
        classes: names in id order. A CLASS of digits is an id.

    Raises:
        UserError: a malformed entry, an unknown class, an id that is also the name of another class, a value
            named twice, or ids and colours in one map.
    """
    if not entries:
        return None
    class_of: dict[int, int] = {}
    entry_of: dict[int, str] = {}
    kinds: dict[bool, str] = {}
    for entry in entries:
        left, equals, right = (part.strip() for part in entry.partition("="))
        shown = " ".join(entry.split())
        where = f"--data.mask-map {shown}"
        stored, in_colour = _stored(left)
        if not equals or not stored:
            raise UserError(f"{where}: expected STORED=CLASS with an id, a range of ids or a colour on the "
                            "left, such as 7=0, 1-150=0-149 or #804080=road")
        kinds.setdefault(in_colour, shown)
        for value, target in zip(stored, _targets(right, len(stored), classes, where), strict=True):
            if entry_of.setdefault(value, shown) != shown:
                raise UserError(f"{where}: {entry_of[value]} already maps this; remove one of them")
            class_of[value] = target
    if len(kinds) == 2:
        raise UserError(f"--data.mask-map: {kinds[False]} maps ids and {kinds[True]} maps colours; use one "
                        "or the other")
    names_ignore = False in kinds and IGNORE in class_of
    if False in kinds:
        class_of.setdefault(IGNORE, IGNORE)
    ordered = sorted(class_of)
    targets = np.array([class_of[value] for value in ordered], dtype=np.int16)
    return MaskMap(np.array(ordered, dtype=np.int64), targets, True in kinds, names_ignore)


def _stored(text: str) -> tuple[Sequence[int], bool]:
    """Values named by the left side (none if malformed), and True if they are colours."""
    if found := _HEX.fullmatch(text):
        return [int(found[1], 16)], True
    if found := _TRIPLE.fullmatch(text):
        red, green, blue = map(int, found.groups())
        return [red << 16 | green << 8 | blue] if max(red, green, blue) < 256 else [], True
    return _ids(text), False


def _targets(text: str, count: int, classes: Sequence[str], where: str) -> Sequence[int]:
    """Class ids that the right side gives for `count` stored ids."""
    ids, named = _ids(text), list(classes).index(text) if text in classes else IGNORE
    if not ids:
        if text not in classes and text != "ignore":
            raise UserError(f"{where}: unknown class; the classes are {', '.join(classes)}, and ignore")
        ids = [named]
    elif named not in (ids[0], IGNORE):
        raise UserError(f"{where}: {text} may be the id {ids[0]}, or the class named {text}, which has the "
                        f"id {named}; name classes with a letter")
    if len(ids) not in (1, count):
        raise UserError(f"{where}: maps {count} ids to {len(ids)}; give one class, or as many")
    wrong = next((class_id for class_id in ids if class_id >= len(classes) and class_id != IGNORE), None)
    if wrong is not None:
        raise UserError(f"{where}: unknown class id {wrong}; the class list has ids 0 to {len(classes) - 1} "
                        "(255 is ignore)")
    return list(ids) * (count // len(ids))


def _ids(text: str) -> Sequence[int]:
    """Ids of `7` or `1-150`; empty if malformed, descending, or beyond `MAX_ID`."""
    found = _RANGE.fullmatch(text)
    if not found:
        return []
    first, last = int(found[1]), int(found[2] or found[1])
    return range(first, last + 1) if last <= MAX_ID else []
