"""Reading the shapes of an image in any supported format."""

import os

from stpp.annotations import coco, labelme, yolo
from stpp.annotations.shapes import Annotated, ShapeSource


def read(source: ShapeSource, path: str | os.PathLike, width: int, height: int) -> Annotated:
    """Reads the shapes that a file stores for an image of this size.

    Raises:
        UserError: the file is not in the source's format.
    """
    if source.format == "coco":
        return coco.read(path, source.parts, source.size)
    return yolo.read(path, width, height) if source.format == "yolo" else labelme.read(path)
