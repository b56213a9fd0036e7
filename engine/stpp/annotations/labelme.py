"""labelme JSON: one file per image, with shapes by label name."""

import base64
import binascii
import io
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

from stpp.annotations import json_stream
from stpp.annotations.regions import Bitmap, Outline, Region, ring
from stpp.annotations.shapes import Annotated, Shape
from stpp.errors import UserError
from stpp.images.image_file import DECODE_ERRORS, MAX_PIXELS

MOST_BYTES = 1 << 28
"""Largest file that is read; a file may embed the image."""
_CORNERS = 64
"""Corners of the polygon that approximates a circle."""


def read(path: str | os.PathLike) -> Annotated:
    """Reads the shapes of an image.

    Raises:
        UserError: not a labelme file.
    """
    value = _loaded(path)
    shapes, problems = [], []
    for number, shape in enumerate(value["shapes"]):
        where = f"shapes[{number}]"
        try:
            shapes.append(_shape(shape, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    size = value.get("imageWidth"), value.get("imageHeight")
    if not all(type(side) is int and side > 0 for side in size):
        size = None
    return Annotated(size, shapes, problems + _name_mismatch(value.get("imagePath"), path))


def _loaded(path: str | os.PathLike) -> dict:
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        value = json_stream.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as labelme's JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("shapes"), list):
        raise UserError(f"{path}: not a labelme JSON: it has no list `shapes`")
    return value


def _name_mismatch(image_path: object, path: str | os.PathLike) -> list[str]:
    """A problem if the file's imagePath names another image."""
    if not isinstance(image_path, str) or not image_path:
        return []
    stem = os.path.splitext(re.split(r"[/\\]", image_path)[-1])[0]
    own = os.path.splitext(os.path.basename(path))[0]
    if unicodedata.normalize("NFC", stem) == unicodedata.normalize("NFC", own):
        return []
    return [f"its imagePath names another image, {image_path[:120]!r}; name the file like its image"]


def _shape(value: object, where: str) -> Shape:
    if not isinstance(value, dict) or not isinstance(label := value.get("label"), str):
        raise ValueError("expected an object with a label")
    kind = value.get("shape_type") or "polygon"
    if kind == "mask":
        return Shape(where, label, _bitmap(value))
    if kind not in ("polygon", "rectangle", "circle"):
        return Shape(where, label, None, doubt=f"a {str(kind)[:40]} covers no pixels")
    return Shape(where, label, _outline(kind, ring(value.get("points"))))


def _outline(kind: str, points: np.ndarray) -> Region:
    if kind == "polygon":
        return Outline((points,))
    if len(points) not in ((2, 4) if kind == "rectangle" else (2,)):
        raise ValueError(f"a {kind} needs two points, got {len(points)}")
    if kind == "rectangle":
        (left, top), (right, low) = points.min(0), points.max(0)
        return Outline((ring([left, top, right, top, right, low, left, low]),))
    centre, edge = points
    turn = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    radius = np.hypot(*(edge - centre))
    return Outline((ring(centre + radius * np.column_stack((np.cos(turn), np.sin(turn)))),))


def _bitmap(value: dict) -> Bitmap:
    """Decodes a mask shape: a base64 PNG whose upper left corner is the first of two points."""
    (x, y), _ = _two_points(ring(value.get("points")))
    try:
        data = base64.b64decode(value["mask"], validate=True)
        size = _pixels(data).shape
        return Bitmap(round(x), round(y), size, lambda: _pixels(data))  # a file may hold very many
    except (KeyError, binascii.Error, *DECODE_ERRORS) as error:
        raise ValueError(f"its mask cannot be read ({type(error).__name__})") from None


def _pixels(data: bytes) -> np.ndarray:
    """Decodes a PNG: bool [h, w]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too large")
        return np.asarray(image.convert("L")) > 0


def _two_points(points: np.ndarray) -> np.ndarray:
    if len(points) != 2:
        raise ValueError(f"a mask needs two points, got {len(points)}")
    return points
