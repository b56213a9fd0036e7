"""Table of folder names that denote official splits."""

import functools
import re

FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Split of a folder by its lower-case name; a year may follow, as in COCO's `train2017`."""
_YEAR = re.compile(r"[_\-]?(?:19|20)\d\d")
_NEARLY = re.compile(
    rf"(?:{'|'.join(FOLDERS)}|dev|eval|evaluation|holdout)"
    r"(?:[_\- ]?(?:set|sets|split|data|dataset|img|imgs|image|images|photos|frames|\d))?|trainval"
)


@functools.lru_cache(maxsize=4096)
def kind(folder: str) -> str | None:
    """Split that a folder name denotes, "train", "val" or "test"; None for other names."""
    name = folder.lower()
    found = _YEAR.search(name)
    return FOLDERS.get(name[: found.start()] if found and found.end() == len(name) else name)


def kinds(image: str) -> set[str]:
    """Splits that the folders of an image's path denote: "train", "val", "test"."""
    return {split for part in image.split("/")[:-1] if (split := kind(part))}


def is_nearly_official(folder: str) -> bool:
    """True for names such as `val_images` or `dev`, which may mean a split but are not in the table."""
    return kind(folder) is None and _NEARLY.fullmatch(folder.lower()) is not None
