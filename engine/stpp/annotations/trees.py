"""Output trees for exported files: a folder or a zip archive, created atomically."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from stpp import files
from stpp.errors import UserError


class Tree(Protocol):
    """Receives files by path."""

    def add(self, path: str, data: bytes) -> None:
        """Writes a file; `path` uses forward slashes and stays inside the tree."""
        ...


class _FolderTree:
    def __init__(self, folder: Path):
        self._folder = folder
        self._made: set[str] = set()

    def add(self, path: str, data: bytes) -> None:
        target = f"{self._folder}/{path}"
        parent = os.path.dirname(target)
        if parent not in self._made:
            os.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        with files.plain(target) as file:
            file.write(data)


class _ZipTree:
    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive

    def add(self, path: str, data: bytes) -> None:
        # Fixed timestamp: the same files give the same archive.
        self._archive.writestr(zipfile.ZipInfo(path), data)


@contextlib.contextmanager
def opened(out: Path) -> Iterator[Tree]:
    """A tree that becomes `out` when the block succeeds; a zip archive if the name ends in `.zip`."""
    if out.suffix.lower() == ".zip":
        with files.atomic(out) as file, zipfile.ZipFile(file, "w") as archive:
            yield _ZipTree(archive)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield _FolderTree(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Rejects an existing output.

    Raises:
        UserError: `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} already exists; remove it, or choose another name")
