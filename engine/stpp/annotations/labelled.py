"""Labelled images for export: image metadata, the classes to export, and the objects of a mask."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stpp.annotations.regions import Patch

BACKGROUND = "background"
IGNORED = "ignore"


class LabelledImage(NamedTuple):
    """Metadata of a labelled image."""

    key: str
    """Image name below its source, without the extension."""
    name: str
    """Image name below its source, with the extension."""
    width: int
    height: int
    score: float
    """Mean confidence of its mask, 0 to 1."""
    turn: int = 1
    """EXIF orientation of an image that was labelled as stored: tools show it upright, which `width` and
    `height` are."""


class Object(NamedTuple):
    """Edge-connected pixels of one class."""

    class_id: int
    """Class id; 255: ignored."""
    patch: Patch
    area: int


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Classes to export and the smallest object."""

    names: tuple[str, ...]
    min_area: int = 0
    """Smallest exported object, in pixels."""

    @property
    def background(self) -> int | None:
        """Id of the background class, which tools store as no object; None without one."""
        return next((i for i, name in enumerate(self.names) if is_background(name)), None)

    @property
    def foreground(self) -> list[int]:
        """Ids of the classes whose pixels form objects."""
        return [i for i in range(len(self.names)) if i != self.background]


def is_background(name: str) -> bool:
    """True for `background` in any tool's spelling, such as labelme's `_background_`."""
    return name.strip("_ ").lower() == BACKGROUND


def objects(mask_HW: np.ndarray, scheme: Scheme) -> list[Object]:
    """Objects of a mask, uint8 [H, W], largest first."""
    present = np.bincount(mask_HW.ravel(), minlength=256)
    found = [component for class_id in scheme.foreground if present[class_id]
             for component in components_of(mask_HW, class_id) if component.area >= scheme.min_area]
    return sorted(found, key=lambda component: -component.area)


def components_of(mask_HW: np.ndarray, class_id: int) -> list[Object]:
    """Edge-connected parts of a class, or of 255, in a mask, uint8 [H, W]."""
    from scipy import ndimage

    numbers, _ = ndimage.label(mask_HW == class_id)
    areas = np.bincount(numbers.ravel())
    return [Object(class_id, Patch(columns.start, rows.start, numbers[rows, columns] == number),
                   int(areas[number]))
            for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1)]


def kept(mask_HW: np.ndarray, components: list[Object], *, empty: int) -> np.ndarray:
    """Mask of the given objects only, uint8 [H, W]; `empty` elsewhere."""
    out = np.full_like(mask_HW, empty)
    for component in components:
        tall, wide = component.patch.pixels.shape
        part = out[component.patch.y : component.patch.y + tall, component.patch.x : component.patch.x + wide]
        part[component.patch.pixels] = component.class_id
    return out
