"""The class list of a data set: names in the order of their ids."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stpp.dataset import cityscapes, class_files
from stpp.errors import UserError

VOC_CLASSES = tuple(
    (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
        "motorbike person "
        "pottedplant sheep sofa train tvmonitor"
    ).split()
)
"""Of VOC 2012."""
_OF_LAYOUT = {"voc": VOC_CLASSES, "cityscapes": cityscapes.CLASSES}
_NOT_CLASSES = {
    "ignore",
    "ignored",
    "ignorelabel",
    "void",
    "unlabeled",
    "unlabelled",
    "notlabeled",
    "notlabelled",
    "dontcare",
}
"""What pixels that count nowhere are called, in lower case and letters alone."""
_NOT_CLASS_WORDS = {"ignore", "void", "unlabeled", "unlabelled"}
"""Words of longer names for these, such as `unlabelled area`."""


@dataclass(frozen=True, slots=True)
class ClassList:
    """Class names, and where they are from."""

    names: list[str]
    source: str
    """A flag, a file, or a layout."""
    of_layout: bool = False
    """True where they are the public data set's, which has this layout."""


def class_list(root: str | os.PathLike, layout: str, given: Sequence[str] = (),
               own: ClassList | None = None) -> ClassList:
    """Finds the class names: `given`; else those of a file in the root (see stpp.dataset.class_files); else
    VOC's and Cityscapes' in their layouts.

    Args:
        own: those that the files of a tool have, which its layout is for; `classes.json` wins over them.

    Raises:
        UserError: none of these; a file that cannot be read, or two that differ; no list of 2 to 255
            different names; a name that pixels have which count nowhere.
    """
    folder = Path(root).expanduser()
    if given:
        found = ClassList([name.strip() for name in given], "--data.classes")
    elif own is not None and not (folder / class_files.JSON).is_file():
        found = own
    elif read := class_files.find(folder):
        found = ClassList(*read)
    elif layout in _OF_LAYOUT:
        return ClassList(list(_OF_LAYOUT[layout]), f"the layout {layout}", of_layout=True)
    else:
        raise UserError(
            f"--data.classes: the class names are not known; give them in the order of their ids, or write "
            f'{folder / class_files.JSON}: {{"classes": ["background", ...]}}'
        )
    names, source = found.names, found.source
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise UserError(
            f"{source}: expected 2 to 255 different class names, got {len(names)} ({len(set(names))} "
            f"different)"
        )
    _refuse_ignore(names, source)
    return found


def counts_nowhere(name: str) -> bool:
    """True for what pixels that count nowhere are called, such as `ignore`, `Void` or `unlabelled area`."""
    parts = re.split(r"[\W_]+", name.lower())
    return "".join(parts) in _NOT_CLASSES or bool(_NOT_CLASS_WORDS & set(parts))


def _refuse_ignore(names: list[str], source: str) -> None:
    """A class of this name would be learned, where pixels that count nowhere are meant more often than
    not."""
    wrong = [i for i, name in enumerate(names) if counts_nowhere(name)]
    if not wrong:
        return
    kept = [i for i in range(len(names)) if i not in wrong]
    entries = " ".join(
        f"{i}={kept.index(i)}" if i in kept else f"{i}=ignore" for i in range(min(len(names), 12))
    )
    more = " ..." * (len(names) > 12)
    raise UserError(
        f"{source}: {names[wrong[0]]!r} is a class here, id {wrong[0]}, and would be learned like the "
        f"others; if its pixels are to "
        f"count nowhere, take it off the list and give what ids or colours mean it as ignore (where the "
        f"masks hold the ids of this "
        f"list: --data.mask-map {entries}{more}); if it is a class, give it another name, such as 'other'"
    )
