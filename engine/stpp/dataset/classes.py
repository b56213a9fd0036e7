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
        "motorbike person pottedplant sheep sofa train tvmonitor"
    ).split()
)
"""Classes of VOC 2012."""
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
"""Names of ignored pixels, in lower case and letters only."""
_NOT_CLASS_WORDS = {"ignore", "void", "unlabeled", "unlabelled"}
"""Words that mark longer names of ignored pixels, such as `unlabelled area`."""


@dataclass(frozen=True, slots=True)
class ClassList:
    """Class names and their source."""

    names: list[str]
    source: str
    """A flag, a file, or a layout."""
    of_layout: bool = False
    """True for the classes of the public data set with this layout."""


def class_list(root: str | os.PathLike, layout: str, given: Sequence[str] = (),
               own: ClassList | None = None) -> ClassList:
    """Determines the class names: `given`; otherwise those of a file in the root (see
    stpp.dataset.class_files); otherwise VOC's and Cityscapes' in their layouts.

    Args:
        own: names from the annotation tool's own files; `classes.json` takes precedence.

    Raises:
        UserError: no class names; an unreadable file, or two that differ; not 2 to 255 distinct names; a name
            that denotes ignored pixels.
    """
    folder = Path(root).expanduser()
    if given:
        listed = ClassList([name.strip() for name in given], "--data.classes")
    elif own is not None and not (folder / class_files.JSON).is_file():
        listed = own
    elif read := class_files.find(folder):
        listed = ClassList(*read)
    elif layout in _OF_LAYOUT:
        return ClassList(list(_OF_LAYOUT[layout]), f"the layout {layout}", of_layout=True)
    else:
        raise UserError(
            f"--data.classes: the class names are unknown; give them in the order of their ids, or write "
            f'{folder / class_files.JSON}: {{"classes": ["background", ...]}}'
        )
    names, source = listed.names, listed.source
    if not 2 <= len(names) <= 255 or len(set(names)) != len(names):
        raise UserError(f"{source}: expected 2 to 255 distinct class names, got {len(names)} "
                        f"({len(set(names))} distinct)")
    _refuse_ignore(names, source)
    return listed


def counts_nowhere(name: str) -> bool:
    """True for names of ignored pixels, such as `ignore`, `Void` or `unlabelled area`."""
    parts = re.split(r"[\W_]+", name.lower())
    return "".join(parts) in _NOT_CLASSES or bool(_NOT_CLASS_WORDS & set(parts))


def _refuse_ignore(names: list[str], source: str) -> None:
    """Rejects class names that usually denote ignored pixels, as the class would be learned."""
    wrong = [i for i, name in enumerate(names) if counts_nowhere(name)]
    if not wrong:
        return
    kept = [i for i in range(len(names)) if i not in wrong]
    entries = " ".join(
        f"{i}={kept.index(i)}" if i in kept else f"{i}=ignore" for i in range(min(len(names), 12))
    )
    more = " ..." * (len(names) > 12)
    raise UserError(
        f"{source}: {names[wrong[0]]!r} is in the class list, id {wrong[0]}, and would be learned like the "
        "others; to ignore its pixels, remove it from the list and map its ids or colours to ignore (if "
        f"masks hold the ids of this list: --data.mask-map {entries}{more}); to keep it as a class, rename "
        "it, for example to 'other'"
    )
