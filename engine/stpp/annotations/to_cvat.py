"""Export to CVAT's "Segmentation mask 1.1": SegmentationClass in the colours of `labelmap.txt`,
SegmentationObject with an object number per pixel, both in VOC's colours, and a list of the images."""

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
    components_of,
    kept,
    objects,
)
from stpp.images.masks import IGNORE
from stpp.images.palette import voc_colours

_MOST_OBJECTS = 255
"""Objects per image: readers of the format know VOC's 256 object colours."""


class Pictures(NamedTuple):
    """The two PNGs of an image."""

    classes: bytes
    objects: bytes


def encode(image: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Pictures:
    """PNGs of a mask, uint8 [H, W]."""
    foreground = objects(mask_HW, scheme)
    class_ids = kept(mask_HW, foreground, empty=IGNORE)  # also objects that are too small
    if scheme.background is not None:
        class_ids[mask_HW == scheme.background] = scheme.background
    components = sorted(foreground + components_of(class_ids, IGNORE), key=lambda component: -component.area)
    numbers = np.zeros(mask_HW.shape, dtype=np.uint8)
    for number, component in zip(_numbers(components), components, strict=True):
        x, y, pixels = component.patch
        numbers[y : y + pixels.shape[0], x : x + pixels.shape[1]][pixels] = number
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[[*scheme.foreground, IGNORE]] = _class_colours(scheme)
    return Pictures(_png(colours[class_ids]), _png(voc_colours(np.arange(256))[numbers]))


def _class_colours(scheme: Scheme) -> np.ndarray:
    """Colours of the foreground classes and, last, of ignored pixels; black is the background's."""
    return voc_colours(np.array([*range(1, len(scheme.foreground) + 1), IGNORE]))


def _numbers(components: list[Object]) -> list[int]:
    """Object numbers from 1, largest object first; beyond the format's limit, small objects of a class share
    one."""
    if len(components) <= _MOST_OBJECTS:
        return list(range(1, len(components) + 1))
    classes = sorted({component.class_id for component in components})
    alone = _MOST_OBJECTS - len(classes)
    return [number if number <= alone else alone + 1 + classes.index(component.class_id)
            for number, component in enumerate(components, 1)]


def _png(pixels_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def labelmap(scheme: Scheme) -> str:
    """Text of `labelmap.txt`."""
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

    def add(self, image: LabelledImage, pictures: Pictures) -> None:
        """Adds an image."""
        self._names.append(f"{image.key}\n")
        self._tree.add(f"SegmentationClass/{image.key}.png", pictures.classes)
        self._tree.add(f"SegmentationObject/{image.key}.png", pictures.objects)

    def __exit__(self, *raised: object) -> bool | None:
        if raised[0] is None:
            self._tree.add(LABELMAP, labelmap(self._scheme).encode())
            self._tree.add("ImageSets/Segmentation/default.txt", "".join(self._names).encode())
        return self._opened.__exit__(*raised)
