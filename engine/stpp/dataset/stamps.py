"""Stamps of files, which detect changes since the index was made."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stpp.dataset.layouts import FoundImage


class Stamp(NamedTuple):
    """State of a file on disk; -1 if it is not a readable file."""

    path: str
    bytes: int
    mtime_ns: int
    file: tuple[int, int]
    """Device and inode, equal for all links to a file; (0, 0) if unknown."""


def listing(root: Path, found: list[FoundImage]) -> Iterator[Stamp]:
    """Stamps of every image and mask, in order."""
    for found_image in found:
        for path in (found_image.image, found_image.mask):
            if path is not None:
                yield stamp(root, path)


def stamp(root: Path, path: str) -> Stamp:
    """Stamp of a file below the root."""
    try:
        status = os.stat(os.path.join(root, path))
    except OSError:
        return Stamp(path, -1, -1, (0, 0))
    if not stat.S_ISREG(status.st_mode):
        return Stamp(path, -1, -1, (0, 0))
    return Stamp(
        path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino) if status.st_ino else (0, 0)
    )
