"""Export to Label Studio predictions: one task per image, with a brush region per class."""

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
"""Tag names in the project's labelling setup, and the task field that holds the image address."""
CONFIG = "label-config.xml"
LOCAL_FILES = "/data/local-files/?d="
"""Prefix of images that Label Studio serves from its own disk."""
PART_BYTES = 100 << 20
"""Size of one task file; larger imports are slow or rejected."""


def encode(image: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> str:
    """Regions of a mask, uint8 [H, W], as JSON."""
    if scheme.min_area > 1:
        empty = scheme.background if scheme.background is not None else 255
        mask_HW = kept(mask_HW, objects(mask_HW, scheme), empty=empty)
    return json.dumps(result(mask_HW, scheme, image.score))


def result(mask_HW: np.ndarray, scheme: Scheme, score: float) -> list[dict]:
    """Regions of a mask: `result` of a prediction."""
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
    """Labelling setup of a project that accepts the predictions."""
    labels = "\n".join(f"    <Label value={quoteattr(scheme.names[i])}/>" for i in scheme.foreground)
    return (f'<View>\n  <Image name="{TO_NAME}" value="${DATA}" zoom="true"/>\n'
            f'  <BrushLabels name="{FROM_NAME}" toName="{TO_NAME}">\n{labels}\n  </BrushLabels>\n</View>\n')


def tags(setup: object) -> tuple[str, str, str]:
    """(brush label tag, image tag, task field with the image address) of an untrusted labelling setup; those
    of `config` if the setup is empty.

    Raises:
        ValueError: no brush labels or no image tag; the message is the reason.
    """
    if not isinstance(setup, str) or not setup.strip():
        return FROM_NAME, TO_NAME, DATA
    brush, images = re.search(r"<BrushLabels\b[^>]*>", setup), re.findall(r"<Image\b[^>]*>", setup)
    if brush is None or not images:
        raise ValueError("the labelling setup has no <BrushLabels> or no <Image>")
    name, to_name = _attribute(brush[0], "name"), _attribute(brush[0], "toName")
    value_of = {_attribute(image, "name"): _attribute(image, "value") for image in images}
    if name is None or to_name is None or value_of.get(to_name) is None:
        raise ValueError("the labelling setup's <BrushLabels> has no name, or its toName names no <Image> "
                         "with a value")
    return name, to_name, value_of[to_name]


def _attribute(tag: str, name: str) -> str | None:
    found = re.search(rf"\s{name}\s*=\s*[\"']\$?([^\"']+)[\"']", tag)
    return found and found[1]


class LabelStudioWriter:
    """Writes a JSON file, or a folder of task files with the labelling setup.

    Args:
        prefix: prepended to image names, which are URL-quoted.
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

    def add(self, image: LabelledImage, regions: str) -> None:
        """Adds an image."""
        data = json.dumps({DATA: self._prefix + urllib.parse.quote(image.name)})
        prediction = (f'{{"model_version": "stpp {__version__}", "score": {image.score!r}, '
                      f'"result": {regions}}}')
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
