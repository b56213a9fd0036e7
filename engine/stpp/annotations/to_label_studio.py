"""Masks as Label Studio's predictions: a task for each image, and in it a brush region for each class."""

import json
import re
import urllib.parse
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from stpp import __version__, files
from stpp.annotations import runs, trees
from stpp.annotations.labelled import LabelledImage, Scheme, kept, objects

FROM_NAME, TO_NAME, DATA = "label", "image", "image"
"""Names of the tags in the project's labelling setup, and of the entry that names the image."""
CONFIG = "label-config.xml"
LOCAL_FILES = "/data/local-files/?d="
"""Before the names of images that Label Studio serves from its own disk."""
PART_BYTES = 100 << 20
"""Of one file of tasks: an import of more takes long, or is refused."""


def encode(one: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> str:
    """The regions of a mask, uint8 [H, W], as JSON."""
    if scheme.min_area > 1:
        empty = scheme.background if scheme.background is not None else 255
        mask_HW = kept(mask_HW, objects(mask_HW, scheme), empty=empty)
    return json.dumps(result(mask_HW, scheme, one.score))


def result(mask_HW: np.ndarray, scheme: Scheme, score: float) -> list[dict]:
    """The regions of a mask: `result` of a prediction."""
    height, width = mask_HW.shape
    regions = []
    for class_id in scheme.foreground:
        pixels = mask_HW == class_id
        if pixels.any():
            value = {"format": "rle", "rle": runs.brush(pixels), "brushlabels": [scheme.names[class_id]]}
            regions.append({"id": f"class-{class_id}", "type": "brushlabels", "from_name": FROM_NAME,
                            "to_name": TO_NAME, "original_width": width, "original_height": height,
                            "image_rotation": 0, "score": score, "value": value})
    return regions


def config(scheme: Scheme) -> str:
    """The labelling setup of a project that takes the predictions."""
    labels = "\n".join(f"    <Label value={quoteattr(scheme.names[i])}/>" for i in scheme.foreground)
    return (f'<View>\n  <Image name="{TO_NAME}" value="${DATA}" zoom="true"/>\n'
            f'  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">\n{labels}\n  </BrushLabels>\n</View>\n')


def tags(setup: object) -> tuple[str, str, str]:
    """(name of the brush labels, of the image, entry of a task's data with its address) of a labelling setup,
    which is not trusted; those of `config` where there is none.

    Raises:
        ValueError: it has no brush labels or no image, with the reason.
    """
    if not isinstance(setup, str) or not setup.strip():
        return FROM_NAME, TO_NAME, DATA
    brush, image = (re.search(rf"<{tag}\b[^>]*>", setup) for tag in ("BrushLabels", "Image"))
    if brush is None or image is None:
        raise ValueError("the labelling setup has no <BrushLabels> or no <Image>")
    found = [re.search(rf"\b{name}=[\"']\$?([^\"']+)[\"']", tag[0])
             for tag, name in ((brush, "name"), (brush, "toName"), (image, "value"))]
    if not all(found):
        raise ValueError("the labelling setup's <BrushLabels> or <Image> lacks a name")
    return found[0][1], found[1][1], found[2][1]


class LabelStudioWriter:
    """Writes a JSON file, or a folder of files of some hundred MB and the labelling setup.

    Args:
        prefix: before the names of images, which are quoted as in a URL.
    """

    def __init__(self, out: Path, scheme: Scheme, prefix: str = LOCAL_FILES):
        self._scheme, self._prefix = scheme, prefix
        self._one_file = out.suffix.lower() == ".json"
        self._opened = files.atomic(out) if self._one_file else trees.opened(out)
        self._tasks: list[bytes] = []
        self._parts = self._bytes = self._count = 0

    def __enter__(self) -> "LabelStudioWriter":
        self._target = self._opened.__enter__()
        return self

    def add(self, one: LabelledImage, regions: str) -> None:
        """Takes an image."""
        data = json.dumps({DATA: self._prefix + urllib.parse.quote(one.name)})
        prediction = f'{{"model_version": "stpp {__version__}", "score": {one.score!r}, "result": {regions}}}'
        task = f'{{"data": {data}, "predictions": [{prediction}]}}'.encode()
        if self._one_file:
            self._target.write((b"[\n" if not self._count else b",\n") + task)
        else:
            self._tasks.append(task)
            self._bytes += len(task)
            if self._bytes >= PART_BYTES:
                self._flush()
        self._count += 1

    def _flush(self) -> None:
        self._target.add(f"tasks-{self._parts:04d}.json", b"[\n" + b",\n".join(self._tasks) + b"\n]\n")
        self._parts, self._tasks, self._bytes = self._parts + 1, [], 0

    def __exit__(self, *raised: object) -> bool | None:
        if raised[0] is None and self._one_file:
            self._target.write(b"\n]\n" if self._count else b"[]\n")
        elif raised[0] is None:
            if self._tasks:
                self._flush()
            self._target.add(CONFIG, config(self._scheme).encode())
        return self._opened.__exit__(*raised)
