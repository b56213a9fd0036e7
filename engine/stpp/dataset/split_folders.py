"""The table of folders that say what their images are for."""

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
"""What a folder of this name, in lower case, holds; a year may follow, as in COCO's `train2017`."""
_YEAR = re.compile(r"[_\-]?(?:19|20)\d\d")
_NEARLY = re.compile(
    rf"(?:{'|'.join(FOLDERS)}|dev|eval|evaluation|holdout)"
    r"(?:[_\- ]?(?:set|sets|split|data|dataset|img|imgs|image|images|photos|frames|\d))?|trainval"
)


@functools.lru_cache(maxsize=4096)
def kind(folder: str) -> str | None:
    """What a folder holds by its name, "train", "val" or "test"; None where that says nothing."""
    name = folder.lower()
    found = _YEAR.search(name)
    return FOLDERS.get(name[: found.start()] if found and found.end() == len(name) else name)


def kinds(image: str) -> set[str]:
    """What the folders of a path say that it is for: "train", "val", "test"."""
    return {found for part in image.split("/")[:-1] if (found := kind(part))}


def is_nearly_official(folder: str) -> bool:
    """True for a name such as `val_images` or `dev`, which may mean a split, and is not in the table."""
    return kind(folder) is None and _NEARLY.fullmatch(folder.lower()) is not None
