"""Masks as COCO's JSON: an annotation for each object, as compressed run lengths or as polygons, both
exact."""

import contextlib
import json
import tempfile
from pathlib import Path

import numpy as np

from stpp import __version__, files
from stpp.annotations import runs
from stpp.annotations.labelled import LabelledImage, Object, Scheme, objects
from stpp.annotations.outlines import polygon
from stpp.annotations.regions import pycocotools

Parts = list[dict]
"""The annotations of an image, without ids."""


def encode(one: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Parts:
    """The annotations of a mask, uint8 [H, W], as run lengths."""
    return [_part(each, scheme, _runs(each, *mask_HW.shape)) for each in objects(mask_HW, scheme)]


def encode_polygons(one: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Parts:
    """The same as polygons."""
    return [_part(each, scheme, [outline(each).ravel().tolist()]) for each in objects(mask_HW, scheme)]


def outline(one: Object) -> np.ndarray:
    """The outline of an object in its image, int64 [N, 2]."""
    return polygon(one.patch.pixels) + (one.patch.x, one.patch.y)


def _runs(one: Object, height: int, width: int) -> dict:
    counts = runs.of_part(*one.patch, height, width)
    found = pycocotools().frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
    return {"size": [height, width], "counts": found["counts"].decode()}


def _part(one: Object, scheme: Scheme, segmentation: dict | list) -> dict:
    tall, wide = one.patch.pixels.shape
    return {"category_id": scheme.foreground.index(one.class_id) + 1, "segmentation": segmentation,
            "area": one.area, "bbox": [one.patch.x, one.patch.y, wide, tall], "iscrowd": 0}


class CocoWriter:
    """Writes a JSON file; what it holds in memory does not grow with the images."""

    def __init__(self, out: Path, scheme: Scheme):
        self._out, self._scheme = out, scheme
        self._images = self._annotations = 0

    def __enter__(self) -> "CocoWriter":
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(files.atomic(self._out))
            # The annotations come behind all images in the file.
            self._later = stack.enter_context(tempfile.TemporaryFile(dir=self._out.absolute().parent))
            self._begin()
            self._stack = stack.pop_all()
        return self

    def _begin(self) -> None:
        categories = [{"id": number, "name": self._scheme.names[i], "supercategory": ""}
                      for number, i in enumerate(self._scheme.foreground, 1)]
        info = {"description": f"stpp {__version__} export-labels"}
        head = {"info": info, "licenses": [], "categories": categories}
        self._file.write(json.dumps(head, ensure_ascii=False)[:-1].encode() + b', "images": [')

    def add(self, one: LabelledImage, parts: Parts) -> None:
        """Takes an image."""
        self._images += 1
        image = {"id": self._images, "file_name": one.name, "width": one.width, "height": one.height}
        self._put(self._file, self._images, image)
        for part in parts:
            self._annotations += 1
            ids = {"id": self._annotations, "image_id": self._images}
            self._put(self._later, self._annotations, ids | part)

    def _put(self, file, number: int, value: dict) -> None:
        file.write((b"\n" if number == 1 else b",\n") + json.dumps(value, ensure_ascii=False).encode())

    def __exit__(self, *raised: object) -> bool | None:
        if raised[0] is None:
            self._file.write(b'\n], "annotations": [')
            self._later.seek(0)
            while block := self._later.read(1 << 20):
                self._file.write(block)
            self._file.write(b"\n]}\n")
        return self._stack.__exit__(*raised)
