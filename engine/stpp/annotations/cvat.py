"""CVAT's "Segmentation mask 1.1": VOC's folders, masks in colours, and `labelmap.txt`, which says what they
mean."""

import re
from pathlib import Path
from typing import NamedTuple

from stpp import files
from stpp.errors import UserError

LABELMAP = "labelmap.txt"
_LINE = re.compile(r"([^:]+):(?:(\d{1,3}),(\d{1,3}),(\d{1,3}))?:[^:]*:[^:]*")


class LabelColour(NamedTuple):
    """A line of a labelmap."""

    name: str
    colour: tuple[int, int, int] | None


def parsed(lines: list[str]) -> list[LabelColour] | None:
    """Lines `name:r,g,b:parts:actions`, without comments and empty lines; None where one is none."""
    found = [_LINE.fullmatch(line) for line in lines]
    if not lines or not all(found):
        return None
    return [LabelColour(one[1].strip(), tuple(map(int, one.groups()[1:])) if one[2] else None)
            for one in found]


def labels_in(folder: Path) -> list[LabelColour] | None:
    """The labels of the labelmap in a folder; None without one that has colours.

    Raises:
        UserError: see `labels`.
    """
    return labels(folder / LABELMAP) if (folder / LABELMAP).is_file() else None


def labels(path: Path) -> list[LabelColour] | None:
    """The labels of a file with their colours; None where it is no labelmap, or one without colours.

    Raises:
        UserError: it cannot be read, has one colour twice, or one that is none.
    """
    try:
        lines = [line.strip() for line in files.read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a labelmap ({error})") from None
    found = parsed([line for line in lines if line and not line.startswith("#")])
    if found is None or any(label.colour is None for label in found):
        return None
    names: dict[tuple[int, int, int], str] = {}
    for label in found:
        if max(label.colour) > 255:
            raise UserError(f"{path}: the colour {label.colour} of {label.name!r} is none: numbers go to 255")
        if names.setdefault(label.colour, label.name) != label.name:
            raise UserError(f"{path}: {names[label.colour]!r} and {label.name!r} have one colour, "
                            f"{label.colour}; give each its own in the tool, and export again")
    return found
