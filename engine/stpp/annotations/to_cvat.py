"""Masks as CVAT's "Segmentation mask 1.1": SegmentationClass in the colours of `labelmap.txt`,
SegmentationObject with an object's number in each pixel, both in VOC's colours, and a list of the images."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stpp.annotations import trees
from stpp.annotations.cvat import LABELMAP
from stpp.annotations.labelled import (
    BACKGROUND,
    IGNORED,
    LabelledImage,
    Object,
    Scheme,
    kept,
    objects,
)
from stpp.images.masks import IGNORE
from stpp.images.palette import voc_colours

_MOST_OBJECTS = 255
"""Of an image: readers of the format know VOC's 256 colours of objects."""


class Pictures(NamedTuple):
    """The two PNGs of an image."""

    classes: bytes
    objects: bytes


def encode(one: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Pictures:
    """The pictures of a mask, uint8 [H, W]."""
    found = objects(mask_HW, scheme, ignored=True)
    numbers = np.zeros(mask_HW.shape, dtype=np.uint8)
    for number, one_object in zip(_numbers(found), found, strict=True):
        (x, y, pixels) = one_object.patch
        numbers[y : y + pixels.shape[0], x : x + pixels.shape[1]][pixels] = number
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[[*scheme.foreground, IGNORE]] = _class_colours(scheme)
    empty = scheme.background if scheme.background is not None else len(scheme.names)
    class_ids = kept(mask_HW, found, empty=empty)
    return Pictures(_png(colours[class_ids]), _png(voc_colours(np.arange(256))[numbers]))


def _class_colours(scheme: Scheme) -> np.ndarray:
    """Of the foreground classes and, last, of what is ignored; black is the background's."""
    return voc_colours(np.array([*range(1, len(scheme.foreground) + 1), IGNORE]))


def _numbers(found: list[Object]) -> list[int]:
    """A number from 1 for each object, the largest first; where there are too many, the small ones of a class
    share one."""
    if len(found) <= _MOST_OBJECTS:
        return list(range(1, len(found) + 1))
    classes = sorted({one.class_id for one in found})
    alone = _MOST_OBJECTS - len(classes)
    return [number if number <= alone else alone + 1 + classes.index(one.class_id)
            for number, one in enumerate(found, 1)]


def _png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def labelmap(scheme: Scheme) -> str:
    """The text of `labelmap.txt`."""
    names = [scheme.names[i] for i in scheme.foreground] + [IGNORED]
    background = BACKGROUND if scheme.background is None else scheme.names[scheme.background]
    lines = [f"{name}:{','.join(map(str, colour))}::"
             for name, colour in zip(names, _class_colours(scheme).tolist(), strict=True)]
    return "\n".join(["# label:color_rgb:parts:actions", f"{background}:0,0,0::", *lines, ""])


class CvatWriter:
    """Writes a folder or a zip archive."""

    def __init__(self, out: Path, scheme: Scheme):
        self._scheme, self._names = scheme, []
        self._opened = trees.opened(out)

    def __enter__(self) -> "CvatWriter":
        self._tree = self._opened.__enter__()
        return self

    def add(self, one: LabelledImage, pictures: Pictures) -> None:
        """Takes an image."""
        self._names.append(f"{one.key}\n")
        self._tree.add(f"SegmentationClass/{one.key}.png", pictures.classes)
        self._tree.add(f"SegmentationObject/{one.key}.png", pictures.objects)

    def __exit__(self, *raised: object) -> bool | None:
        if raised[0] is None:
            self._tree.add(LABELMAP, labelmap(self._scheme).encode())
            self._tree.add("ImageSets/Segmentation/default.txt", "".join(self._names).encode())
        return self._opened.__exit__(*raised)
