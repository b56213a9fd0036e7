"""The shapes of an image, whatever the format of the file that holds them."""

import os

from stpp.annotations import coco, labelme, yolo
from stpp.annotations.shapes import Annotated, ShapeSource


def read(source: ShapeSource, path: str | os.PathLike, width: int, height: int) -> Annotated:
    """The shapes that a file has of an image of this size.

    Raises:
        UserError: it is no such file.
    """
    if source.format == "coco":
        return coco.read(path, source.parts, source.size)
    return yolo.read(path, width, height) if source.format == "yolo" else labelme.read(path)
