"""Export to COCO JSON: one annotation per object, as compressed run lengths or as polygons; both are
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
"""Annotations of an image, without ids."""


def encode(image: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Parts:
    """Annotations of a mask, uint8 [H, W], as run lengths."""
    return [_part(component, scheme, _runs(component, *mask_HW.shape))
            for component in objects(mask_HW, scheme)]


def encode_polygons(image: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> Parts:
    """Annotations of a mask, uint8 [H, W], as polygons."""
    return [_part(component, scheme, [outline(component).ravel().tolist()])
            for component in objects(mask_HW, scheme)]


def outline(component: Object) -> np.ndarray:
    """Outline of an object in image coordinates, int64 [N, 2]."""
    return polygon(component.patch.pixels) + (component.patch.x, component.patch.y)


def _runs(component: Object, height: int, width: int) -> dict:
    counts = runs.of_part(*component.patch, height, width)
    found = pycocotools().frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
    return {"size": [height, width], "counts": found["counts"].decode()}


def _part(component: Object, scheme: Scheme, segmentation: dict | list) -> dict:
    tall, wide = component.patch.pixels.shape
    return {"category_id": scheme.foreground.index(component.class_id) + 1, "segmentation": segmentation,
            "area": component.area, "bbox": [component.patch.x, component.patch.y, wide, tall], "iscrowd": 0}


class CocoWriter:
    """Writes a JSON file; memory does not grow with the number of images."""

    def __init__(self, out: Path, scheme: Scheme):
        self._out, self._scheme = out, scheme
        self._images = self._annotations = 0

    def __enter__(self) -> "CocoWriter":
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(files.atomic(self._out))
            # COCO files store the annotations after all images.
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

    def add(self, image: LabelledImage, parts: Parts) -> None:
        """Adds an image."""
        self._images += 1
        record = {"id": self._images, "file_name": image.name, "width": image.width, "height": image.height}
        self._put(self._file, self._images, record)
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
