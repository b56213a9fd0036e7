"""Stamps of files: what tells that a file is another one than when the index was made."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stpp.dataset.layouts import Found


class Stamp(NamedTuple):
    """A file as it lies on the disk; -1 for what is no readable file."""

    path: str
    bytes: int
    mtime_ns: int
    file: tuple[int, int]
    """Device and number of the file, alike for all links to it; (0, 0) if they are not known."""


def listing(root: Path, found: list[Found]) -> Iterator[Stamp]:
    """The stamp of every image and mask."""
    for one in found:
        for path in (one.image, one.mask):
            if path is not None:
                yield stamp(root, path)


def stamp(root: Path, path: str) -> Stamp:
    """The stamp of a file below the root."""
    try:
        status = os.stat(os.path.join(root, path))
    except OSError:
        return Stamp(path, -1, -1, (0, 0))
    if not stat.S_ISREG(status.st_mode):
        return Stamp(path, -1, -1, (0, 0))
    return Stamp(
        path, status.st_size, status.st_mtime_ns, (status.st_dev, status.st_ino) if status.st_ino else (0, 0)
    )
