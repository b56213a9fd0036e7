"""What goes out to annotation tools: a labelled image, the classes by the names they have there, and its
objects."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stpp.annotations.regions import Patch
from stpp.images.masks import IGNORE

BACKGROUND = "background"
IGNORED = "ignore"


class LabelledImage(NamedTuple):
    """A labelled image, without its pixels."""

    key: str
    """Its name below its source, without the extension."""
    name: str
    """The same with the extension."""
    width: int
    height: int
    score: float
    """Mean confidence of its mask, 0 to 1."""


class Object(NamedTuple):
    """Pixels of one class that hang together by their edges."""

    class_id: int
    """255: ignored."""
    patch: Patch
    area: int


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The classes, and which of their pixels go out."""

    names: tuple[str, ...]
    min_area: int = 0
    """Objects of fewer pixels are left out."""

    @property
    def background(self) -> int | None:
        """The class that tools know as no object; None without one."""
        return next((i for i, name in enumerate(self.names) if is_background(name)), None)

    @property
    def foreground(self) -> list[int]:
        """The classes whose pixels are objects."""
        return [i for i in range(len(self.names)) if i != self.background]


def is_background(name: str) -> bool:
    """True for `background`, as tools write it: labelme has `_background_`."""
    return name.strip("_ ").lower() == BACKGROUND


def objects(mask_HW: np.ndarray, scheme: Scheme, *, ignored: bool = False) -> list[Object]:
    """The objects of a mask, uint8 [H, W], the largest first.

    Args:
        ignored: pixels that are 255 are objects too.
    """
    from scipy import ndimage

    found = []
    classes = scheme.foreground + [IGNORE] * ignored
    present = np.bincount(mask_HW.ravel(), minlength=256)
    for class_id in classes:
        if not present[class_id]:
            continue
        numbers, count = ndimage.label(mask_HW == class_id)
        areas = np.bincount(numbers.ravel())
        for number, place in enumerate(ndimage.find_objects(numbers), 1):
            if areas[number] >= scheme.min_area:
                rows, columns = place
                pixels = numbers[place] == number
                found.append(Object(class_id, Patch(columns.start, rows.start, pixels), int(areas[number])))
    return sorted(found, key=lambda one: -one.area)


def kept(mask_HW: np.ndarray, found: list[Object], *, empty: int) -> np.ndarray:
    """A mask that holds objects alone, and `empty` elsewhere."""
    out = np.full_like(mask_HW, empty)
    for one in found:
        tall, wide = one.patch.pixels.shape
        part = out[one.patch.y : one.patch.y + tall, one.patch.x : one.patch.x + wide]
        part[one.patch.pixels] = one.class_id
    return out
