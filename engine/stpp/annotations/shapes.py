"""Drawing the shapes of an image into one mask of class ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stpp.annotations.regions import NoArea, Region
from stpp.images.masks import IGNORE

SHOWN = 5
"""Problems listed per image."""


class Shape(NamedTuple):
    """A shape as stored in a file."""

    where: str
    """Location in the file for messages, such as "annotation 7"."""
    label: int | str
    region: Region | None
    """None where the file stores nothing that covers pixels; `doubt` then describes its content."""
    crowd: bool = False
    """True for a region of many objects (COCO's `iscrowd`)."""
    doubt: str | None = None
    """Reason, known from the file, why the shape may differ from the intended pixels."""


class ShapeSource(NamedTuple):
    """Location of the shapes of one image."""

    format: str
    """ "coco", "yolo" or "labelme"."""
    parts: bytes = b""
    size: tuple[int, int] | None = None
    """`size` and `parts` apply to COCO only, see `coco.Listed`."""


class Annotated(NamedTuple):
    """Annotations of one image."""

    size: tuple[int, int] | None
    """(width, height) of the image, if the file records it."""
    shapes: Sequence[Shape]
    problems: Sequence[str] = ()
    """Unreadable shapes, a line each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Legend:
    """Interpretation of shapes as classes."""

    classes: Mapping[int | str, int]
    """Label -> class id, or 255."""
    names: Mapping[int | str, str]
    """Names of numeric labels, for messages."""
    unlisted: int
    """Class id of pixels in no shape, or 255."""
    stored: bool = False
    """True where shapes refer to the stored image, not to the image rotated by its EXIF orientation."""
    smallest_on_top: bool = True
    """True: larger areas are drawn first; False: in file order."""
    crowds: bool = True
    """True: crowds are drawn as their class; False: as 255."""
    lenient: bool = False
    """True: doubtful shapes become 255; False: they are problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A mask drawn from shapes."""

    mask_HW: np.ndarray
    """Class ids, uint8 [H, W]."""
    problems: tuple[str, ...]
    doubtful: tuple[str, ...]
    """Descriptions of the shapes whose pixels became 255."""
    crowds: int
    """Number of crowd shapes."""


def draw(annotated: Annotated, height: int, width: int, legend: Legend) -> Drawn:
    """Draws the shapes of an image of [height, width] pixels, in the orientation they were drawn on."""
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
        except NoArea as error:
            (doubtful if legend.lenient else problems).append(f"{shape.where}: {error}")
            continue
        except ValueError as error:  # covers unknown pixels, which would become unlisted ones
            problems.append(f"{shape.where}: {error}")
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
        return f"its class {name} is not in the file's own list"
    return (f"the label {name[:80]!r} is not a class; add it to --data.classes, or map it: "
            f"--data.mask-map '{name[:80]}=CLASS' (or ignore)")


def _first(problems: Sequence[str]) -> tuple[str, ...]:
    if len(problems) <= SHOWN:
        return tuple(problems)
    return *problems[: SHOWN - 1], f"{problems[SHOWN - 1]}; and {len(problems) - SHOWN} more in this image"
