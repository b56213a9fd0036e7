"""Listing of the files below a folder, without system files, following links only where permitted."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from stpp import outputs
from stpp.errors import UserError
from stpp.images.folders import SkippedFiles

FOLLOW = "--data.follow-links"
INDEX_MARK = ".stpp-index"
OUTPUTS = {INDEX_MARK, "provenance.json", "lease.json"}
"""Files that mark the folder of an index or of a run, whose masks and pictures are not data."""
_UNLISTABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of line breaks, control characters and undecodable bytes: split files cannot store such
names."""


def walk(
    root: Path,
    prefix: str,
    skip: Path | None = None,
    *,
    follow_links: bool = False,
    skipped: SkippedFiles | None = None,
) -> Iterator[str]:
    """Yields relative paths of all files below root/prefix, folder by folder, but not those of runs, and not
    what stpp.outputs says was written there.

    Args:
        skip: a folder to skip.
        follow_links: follow links that lead out of the root; other links are always followed.
        skipped: counts skipped files and folders.

    Raises:
        UserError: an unreadable folder, or a link that leads out of the root.
    """
    skipped = SkippedFiles() if skipped is None else skipped
    top = os.path.join(root, prefix)
    if prefix and not follow_links:
        _inside(root, Path(top))
    if not os.path.isdir(top):
        return
    # Resolved folders on the way down: a link back to one of them would loop forever.
    pending = [(top, prefix, (os.path.realpath(top),))]
    while pending:
        folder, relative, above = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
        names = {entry.name for entry in entries}
        if relative and OUTPUTS & names:
            skipped.runs += 1
            continue
        written = outputs.written(Path(folder)) & names if outputs.MARK in names else set()
        skipped.runs += bool(written)
        for entry in entries:
            if entry.name in written:
                continue
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                raise UserError(f"{entry.path}: cannot be read ({error.strerror})") from error
            if skipped.add(entry.name, is_folder=is_folder):
                continue
            path = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_symlink() and not follow_links:
                _inside(root, Path(entry.path))
            if is_folder:
                real = (
                    os.path.realpath(entry.path)
                    if entry.is_symlink()
                    else os.path.join(above[-1], entry.name)
                )
                if real not in above and (skip is None or Path(real) != skip):
                    pending.append((entry.path, path, (*above, real)))
            else:
                yield path


def refuse_unlistable(root: Path, path: str) -> None:
    """Rejects the path of an image or mask that list files cannot store."""
    if not path.isprintable() and any(unicodedata.category(c) in _UNLISTABLE for c in path):
        raise UserError(
            f"{root}: the name {path!r} contains a line break, a control character or bytes that are not "
            "UTF-8; rename it"
        )


def _inside(root: Path, path: Path) -> None:
    """Rejects a path whose links lead out of the root."""
    target = path.resolve()
    if target != root and root not in target.parents:
        raise UserError(
            f"{path}: is a link to {target}, outside the given folder {root}; {FOLLOW} allows such links"
        )
