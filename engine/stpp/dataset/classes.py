"""The class list of a data set: names in the order of their ids."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stpp.dataset import cityscapes
from stpp.errors import UserError

VOC_CLASSES = tuple(
    (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    ).split()
)
"""Of VOC 2012."""
_OF_LAYOUT = {"voc": VOC_CLASSES, "cityscapes": cityscapes.CLASSES}


def class_list(root: str | os.PathLike, layout: str, given: Sequence[str] = ()) -> list[str]:
    """Finds the class names: `given`; else those of `classes.json` in the root; else VOC's and Cityscapes' in their layouts.

    `classes.json` is a list of names, or an object with such a list under "classes".

    Raises:
        UserError: none of these, or no list of 2 to 255 different names.
    """
    path = Path(root).expanduser() / "classes.json"
    source = "--data.classes"
    if given:
        names = list(given)
    elif path.is_file():
        source = str(path)
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: is not JSON ({' '.join(str(error).split())}); expected a list of class names"
            ) from error
        names = names.get("classes") if isinstance(names, dict) else names
    elif layout in _OF_LAYOUT:
        return list(_OF_LAYOUT[layout])
    else:
        raise UserError(
            f"--data.classes: the class names are not known; give them in the order of their ids, or write {path}: "
            '{"classes": ["background", ...]}'
        )
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise UserError(f"{source}: expected a list of class names in the order of their ids")
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise UserError(
            f"{source}: expected 2 to 255 different class names, got {len(names)} ({len(set(names))} different)"
        )
    return names
