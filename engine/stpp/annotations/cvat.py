"""CVAT's "Segmentation mask 1.1": VOC's folders, colour masks, and `labelmap.txt`, which maps colours to
labels."""

import re
from pathlib import Path
from typing import NamedTuple

from stpp import files
from stpp.errors import UserError

LABELMAP = "labelmap.txt"
_LINE = re.compile(r"([^:]+):(?:(\d{1,3}),(\d{1,3}),(\d{1,3}))?:[^:]*:[^:]*")


class LabelColour(NamedTuple):
    """Name and colour of a label in a labelmap."""

    name: str
    colour: tuple[int, int, int] | None


def parsed(lines: list[str]) -> list[LabelColour] | None:
    """Parses lines `name:r,g,b:parts:actions` without comments and empty lines; None if any line is
    malformed."""
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or not all(matches):
        return None
    return [LabelColour(match[1].strip(), tuple(map(int, match.groups()[1:])) if match[2] else None)
            for match in matches]


def labels_in(folder: Path) -> list[LabelColour] | None:
    """Labels of a folder's labelmap; None if there is none or it has no colours.

    Raises:
        UserError: see `labels`.
    """
    return labels(folder / LABELMAP) if (folder / LABELMAP).is_file() else None


def labels(path: Path) -> list[LabelColour] | None:
    """Labels of a labelmap with their colours; None if the file is not a labelmap or has no colours.

    Raises:
        UserError: unreadable file, one colour for two labels, or an invalid colour.
    """
    try:
        lines = [line.strip() for line in files.read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a labelmap ({error})") from None
    entries = parsed([line for line in lines if line and not line.startswith("#")])
    if entries is None or any(label.colour is None for label in entries):
        return None
    names: dict[tuple[int, int, int], str] = {}
    for label in entries:
        if max(label.colour) > 255:
            raise UserError(f"{path}: the colour {label.colour} of {label.name!r} is invalid: values end at "
                            "255")
        if names.setdefault(label.colour, label.name) != label.name:
            raise UserError(f"{path}: {names[label.colour]!r} and {label.name!r} share the colour "
                            f"{label.colour}; give each its own in the tool, and export again")
    return entries
