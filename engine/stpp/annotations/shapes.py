"""Shapes of an image to one mask of class ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stpp.annotations.regions import Region
from stpp.images.masks import IGNORE

SHOWN = 5
"""Problems of one image that are listed."""


class Shape(NamedTuple):
    """One shape, as a file has it."""

    where: str
    """Its place there, as people find it: "annotation 7"."""
    label: int | str
    region: Region | None
    """None where the file says nothing that covers pixels; `doubt` then says what it has."""
    crowd: bool = False
    """True for a region of many objects (COCO's `iscrowd`)."""
    doubt: str | None = None
    """Why it may cover other pixels than was meant, where the file tells."""


class ShapeSource(NamedTuple):
    """Where the shapes of one image stand."""

    format: str
    """ "coco", "yolo" or "labelme"."""
    parts: bytes = b""
    size: tuple[int, int] | None = None
    """This and `parts`: of COCO, see `coco.Listed`."""


class Annotated(NamedTuple):
    """What a file says of one image."""

    size: tuple[int, int] | None
    """(width, height) of the image, if the file says so."""
    shapes: Sequence[Shape]
    problems: Sequence[str] = ()
    """What cannot be read, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Legend:
    """The meaning of shapes."""

    classes: Mapping[int | str, int]
    """Label -> class id, or 255."""
    names: Mapping[int | str, str]
    """Names of labels that are numbers, for messages."""
    unlisted: int
    """Class id of pixels in no shape, or 255."""
    stored: bool = False
    """True where shapes were drawn on images as they are stored, not as their EXIF orientation turns them."""
    smallest_on_top: bool = True
    """True: larger areas are drawn first; else the order of the file counts."""
    crowds: bool = True
    """True: crowds are drawn as their class; else as 255."""
    lenient: bool = False
    """True: pixels of shapes that may mean others become 255; else such shapes are problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A mask that was drawn."""

    mask_HW: np.ndarray
    """uint8 class ids."""
    problems: tuple[str, ...]
    doubtful: tuple[str, ...]
    """Shapes whose pixels became 255, in words."""
    crowds: int
    """How many shapes are crowds."""


def draw(annotated: Annotated, height: int, width: int, legend: Legend) -> Drawn:
    """Draws all shapes of an image of [height, width], the frame they were drawn in."""
    mask_HW = np.full((height, width), legend.unlisted, dtype=np.uint8)
    problems, doubtful = list(annotated.problems), []
    shapes = list(annotated.shapes)
    if legend.smallest_on_top:
        shapes.sort(key=lambda shape: (not shape.crowd, -shape.region.area if shape.region else 0.0))
    for shape in shapes:
        class_id = legend.classes.get(shape.label)
        if class_id is None:
            problems.append(f"{shape.where}: {_unknown(shape.label, legend)}")
            continue
        try:
            doubt = shape.region.doubt(height, width) if shape.region else None
        except ValueError as error:  # it covers nothing that could be drawn
            (doubtful if legend.lenient else problems).append(f"{shape.where}: {error}")
            continue
        doubt = shape.doubt or doubt
        if doubt is not None:
            (doubtful if legend.lenient else problems).append(f"{shape.where}: {doubt}")
        if shape.region is None or problems:
            continue
        patch = shape.region.patch(height, width)
        tall, wide = patch.pixels.shape
        ignored = doubt is not None or (shape.crowd and not legend.crowds)
        part = mask_HW[patch.y : patch.y + tall, patch.x : patch.x + wide]
        part[patch.pixels] = IGNORE if ignored else class_id
    return Drawn(mask_HW=mask_HW, problems=_first(problems), doubtful=tuple(doubtful),
                 crowds=sum(shape.crowd for shape in shapes))


def _unknown(label: int | str, legend: Legend) -> str:
    name = legend.names.get(label, label)
    if isinstance(name, int):
        return f"its class {name} is none of the file's own list"
    return (f"the label {name[:80]!r} is no class; name it in --data.classes, or say what it means: "
            f"--data.mask-map '{name[:80]}=CLASS' (or ignore)")


def _first(problems: Sequence[str]) -> tuple[str, ...]:
    if len(problems) <= SHOWN:
        return tuple(problems)
    return *problems[: SHOWN - 1], f"{problems[SHOWN - 1]}; and {len(problems) - SHOWN} more in this image"
