"""YOLO polygons: one text per image, and per line a class and x, y, ... as fractions of width and height."""

import os

from stpp import files
from stpp.annotations.regions import Outline, ring
from stpp.annotations.shapes import Annotated, Shape
from stpp.errors import UserError

MOST_BYTES = 1 << 26


def read(path: str | os.PathLike, width: int, height: int) -> Annotated:
    """Reads the shapes of an image of this size, in pixels.

    Raises:
        UserError: the file cannot be read as text.
    """
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise UserError(f"{path}: is larger than {MOST_BYTES >> 20} MiB")
        lines = files.read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    shapes, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            shapes.append(_shape(line.split(), f"line {number}", width, height))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    return Annotated(None, shapes, problems)


def _shape(words: list[str], where: str, width: int, height: int) -> Shape:
    if not words[0].isascii() or not words[0].isdecimal() or len(words[0]) > 6:
        raise ValueError(f"begins with {words[0][:40]!r}, which is not a class number")
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError("holds a value that is not a number") from None
    if len(values) == 4:
        x, y, wide, high = values
        corners = [x - wide / 2, y - high / 2, x + wide / 2, y - high / 2, x + wide / 2, y + high / 2,
                   x - wide / 2, y + high / 2]
        return Shape(where, int(words[0]), _outline(corners, width, height),
                     doubt="it has four numbers: a box, not a polygon")
    return Shape(where, int(words[0]), _outline(values, width, height))


def _outline(values: list[float], width: int, height: int) -> Outline:
    return Outline((ring(ring(values) * (width, height)),))
