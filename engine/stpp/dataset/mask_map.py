"""The mask map: what a user's masks hold, in class ids, where that is not class ids already.

A map is a list of entries `STORED=CLASS`. STORED is an id (`7`), a range of ids (`1-150`), or a colour
(`#804080` or
`128,64,128`); CLASS is a class's id or name, `ignore` (255), or, for a range of ids, a range of as many
(`1-150=0-149`). What the map does not name is an error, but for the id 255, which stays 255.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stpp.errors import UserError
from stpp.images.masks import IGNORE

MAX_ID = (1 << 16) - 1
"""Largest id that a PNG can hold."""
_SHOWN = 5
MANY = 24
"""More unknown colours or ids in one mask are no forgotten entries of the map but noise."""
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_HEX, _TRIPLE = re.compile(r"#([0-9a-fA-F]{6})"), re.compile(r"([0-9]{1,3}),([0-9]{1,3}),([0-9]{1,3})")


@dataclass(frozen=True, eq=False)
class MaskMap:
    """A map that `parse` made."""

    stored: np.ndarray
    """int64 [K], rising: ids, or colours as 65536 * red + 256 * green + blue."""
    classes: np.ndarray
    """int16 [K]: class ids, 255 is ignore."""
    in_colour: bool
    """Whether it names colours; else ids."""
    names_ignore: bool = False
    """True where an entry names the id 255; else 255 stays 255."""

    def __call__(self, values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
        """The class ids of a mask.

        Args:
            values: ids of 0 to 65535, integer [H, W]; or colours, uint8 [H, W, 3].
            path: of the mask, for the error.

        Returns:
            uint8 [H, W].

        Raises:
            UserError: an id or a colour that the map does not name, with the number of its pixels.
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
        """Class ids of stored ids or colours, int16; -1 for what is not named."""
        place = np.searchsorted(self.stored, stored).clip(max=len(self.stored) - 1)
        return np.where(self.stored[place] == stored, self.classes[place], np.int16(-1))

    def _refusal(self, unknown: np.ndarray, path: str | os.PathLike) -> UserError:
        found, counts = np.unique(unknown, return_counts=True)
        if len(found) <= MANY:
            return UserError(f"{path}: {self._named(found, counts)} not in the mask map; add each to "
                             f"--data.mask-map, as "
                             "a class or as ignore")
        what = "colours" if self.in_colour else "ids"
        return UserError(f"{path}: {len(found)} {what} in {len(unknown)} pixels are not in the mask map: "
                         f"soft edges or "
                         "JPEG noise; save the mask as PNG without anti-aliasing, or give every pixel the "
                         "nearest of the "
                         f"map's {len(self.stored)} {what} in an image editor")

    def _named(self, found: np.ndarray, counts: np.ndarray) -> str:
        first = np.argsort(-counts, kind="stable")[:_SHOWN]
        shown = ", ".join(f"{self._name(found[i])} in {counts[i]} pixels" for i in first)
        more = f" and {len(found) - _SHOWN} more" * (len(found) > _SHOWN)
        return f"{'colour' if self.in_colour else 'id'} {shown}{more}"

    def _name(self, stored: int) -> str:
        return f"#{stored:06x}" if self.in_colour else str(stored)


def parse(entries: Sequence[str], classes: Sequence[str]) -> MaskMap | None:
    """Reads the entries of a map; None if there are none.

    Args:
        entries: see the top of this file.
        classes: names in the order of their ids. A CLASS of digits is an id, even if a class is called so.

    Raises:
        UserError: an entry that is none, names no class, or says again what is said; ids and colours in one
            map.
    """
    if not entries:
        return None
    named: dict[int, int] = {}
    by: dict[int, str] = {}
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
        for one, target in zip(stored, _targets(right, len(stored), classes, where), strict=True):
            if by.setdefault(one, shown) != shown:
                raise UserError(f"{where}: {by[one]} names that already; leave one of them out")
            named[one] = target
    if len(kinds) == 2:
        raise UserError(f"--data.mask-map: {kinds[False]} is of ids and {kinds[True]} of colours; masks hold "
                        "one or the other")
    names_ignore = False in kinds and IGNORE in named
    if False in kinds:
        named.setdefault(IGNORE, IGNORE)
    ordered = sorted(named)
    targets = np.array([named[one] for one in ordered], dtype=np.int16)
    return MaskMap(np.array(ordered, dtype=np.int64), targets, True in kinds, names_ignore)


def _stored(text: str) -> tuple[Sequence[int], bool]:
    """What the left side names, and whether that is a colour; nothing where it cannot be read."""
    if found := _HEX.fullmatch(text):
        return [int(found[1], 16)], True
    if found := _TRIPLE.fullmatch(text):
        red, green, blue = map(int, found.groups())
        return [red << 16 | green << 8 | blue] if max(red, green, blue) < 256 else [], True
    return _ids(text), False


def _targets(text: str, count: int, classes: Sequence[str], where: str) -> Sequence[int]:
    """The class ids that the right side means for `count` stored ids."""
    ids = _ids(text)
    if not ids:
        if text not in classes and text != "ignore":
            raise UserError(f"{where}: the right side names no class; the classes are {', '.join(classes)}, "
                            "and ignore")
        ids = [list(classes).index(text) if text in classes else IGNORE]
    if len(ids) not in (1, count):
        raise UserError(f"{where}: {count} ids become {len(ids)}; give one class, or as many")
    wrong = next((one for one in ids if one >= len(classes) and one != IGNORE), None)
    if wrong is not None:
        raise UserError(f"{where}: class id {wrong} is none; the class list has ids 0 to {len(classes) - 1} "
                        "(255 is ignore)")
    return list(ids) * (count // len(ids))


def _ids(text: str) -> Sequence[int]:
    """`7` or `1-150`; nothing where it is neither, falls, or goes beyond `MAX_ID`."""
    found = _RANGE.fullmatch(text)
    if not found:
        return []
    first, last = int(found[1]), int(found[2] or found[1])
    return range(first, last + 1) if last <= MAX_ID else []
