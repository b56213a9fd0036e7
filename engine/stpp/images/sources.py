"""Corpora: folders, lists and tar archives as a stream of items.

Memory does not grow with the number of images.
"""

import functools
import hashlib
import heapq
import itertools
import os
import pickle
import re
import tempfile
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

from stpp.errors import UserError
from stpp.images import storage, tars
from stpp.images.folders import (
    folders_of,
    image_of_mask,
    image_of_mask_in_folder,
    is_leftover,
    is_passed_over,
)
from stpp.images.image_file import IMAGE_EXTENSIONS
from stpp.images.items import Item, SkippedItems, failed_item, item_of, require_readable_name
from stpp.images.lists import ListSource
from stpp.images.names import printable

_RUN = 50_000
"""Names per folder that are sorted in memory; larger folders are merge-sorted on disk."""
_IMAGE_FIELDS = (".image", ".img", ".rgb", ".photo", ".input")
"""WebDataset sample fields that contain the image."""
_MOST_BRACES = 10_000_000


class Source(Protocol):
    """A corpus of images."""

    skipped: SkippedItems
    """Files skipped by the last pass through `items`."""

    def items(self) -> Iterator[Item]:
        """Yields every image once, always in the same order."""
        ...

    def stamp(self) -> dict:
        """JSON values that identify this corpus and change with its content."""
        ...


def open_source(spec: str, *, root: Path | None = None, tar_folders: bool = False) -> Source:
    """Opens the corpus that `--source` names.

    Args:
        spec: a folder, a list file, or tar archives (`shards/{000..127}.tar`); a local path or an fsspec URL.
            An existing folder is always read as a folder, whatever its name.
        root: base folder of relative paths in a list; None: the list's own folder.
        tar_folders: put the masks of each archive into a folder named after the archive.

    Raises:
        UserError: the source is missing or unreadable.
    """
    require_readable_name(spec, "--source")
    local = None if storage.is_url(spec) else storage.kind(_absolute(spec))
    if local == "folder":
        return FolderSource(_absolute(spec))
    paths = [spec] if local else expand_braces(spec)
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", spec):
        raise UserError(f"--source {spec}: compressed archives do not allow random access; give plain .tar "
                        "files (images are compressed already)")
    if spec.endswith(".tar"):
        return TarSource(spec, [_absolute(path) for path in paths], tar_folders)
    if len(paths) > 1:
        raise UserError(f"--source {spec}: braces apply to .tar archives only; give a folder, a list file or "
                        ".tar archives")
    kind = local or storage.kind(spec)
    if kind is None:
        raise UserError(f"--source {spec}: no such folder, list file or .tar archive")
    if kind == "folder":
        return FolderSource(_absolute(spec))
    return ListSource(_absolute(spec), _absolute(str(root)) if root else os.path.dirname(_absolute(spec)))


class FolderSource:
    """All images below a folder, including sub-folders, in name order."""

    def __init__(self, folder: str):
        self._folder = folder.rstrip("/") if not folder.endswith("://") else folder
        self._below = _ImagesBelow(self._folder)
        self.skipped = SkippedItems()

    def items(self) -> Iterator[Item]:
        self.skipped = SkippedItems()
        for name, mark in self._names(""):
            yield item_of(name, name, f"{self._folder}/{name}", mark=mark)

    def stamp(self) -> dict:
        """Digest of names, sizes and modification times; walks the folder."""
        digest, count = hashlib.sha256(), 0
        for name, mark in self._names(""):
            count += 1
            digest.update(_stamped(printable(name), mark))
        return {"kind": "folder", "path": self._folder, "files": count, "digest": digest.hexdigest()}

    def _names(self, below: str, above: tuple = ()) -> Iterator[tuple[str, str]]:
        """Yields names below the folder, with their marks."""
        folder = f"{self._folder}/{below}".rstrip("/")
        try:
            if not storage.is_url(folder):
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in above:
                    return  # a link to one of its own parents
                above = (*above, (status.st_dev, status.st_ino))
            for name, is_folder, mark in _sorted(self._taken(folder)):
                if is_folder:
                    yield from self._names(f"{below}{name}/", above)
                else:
                    yield f"{below}{name}", mark
        except OSError as error:
            reason = storage.describe_error(error)
            raise UserError(f"{folder}: {reason}; its images would be missing") from None

    def _taken(self, folder: str) -> Iterator[tuple[str, bool, str]]:
        siblings = _ImagesInFolder(folder)
        for child in storage.children(folder):
            if self.skipped.add(child.name, is_folder=child.is_folder):
                continue
            if not child.is_folder and self._is_mask(folder, child.name, siblings):
                self.skipped.masks += 1
            elif child.is_folder or _is_image(child.name):
                yield tuple(child)
            else:
                self.skipped.unread(child.name)

    def _is_mask(self, folder: str, name: str, siblings: "_ImagesInFolder") -> bool:
        """True for a PNG that, by its name, is the mask of an image in its folder or in a sibling folder."""
        if not name.lower().endswith(".png"):
            return False
        below = f"{folder.removeprefix(self._folder).lstrip('/')}/{_stem(name)}".lstrip("/")
        return (image_of_mask(_stem(name), siblings) is not None
                or image_of_mask_in_folder(below, self._below, self._below.folders_in) is not None)


class _ImagesInFolder:
    """Names of a folder's images without extension. Local folders are checked per name on demand; remote ones
    are listed once, on first use."""

    def __init__(self, folder: str):
        self._folder, self._listed = folder, None

    def __contains__(self, name: str) -> bool:
        if not storage.is_url(self._folder):
            forms = (str.lower, str.upper, str.title)
            return any(os.path.exists(f"{self._folder}/{name}{form(extension)}")
                       for extension in IMAGE_EXTENSIONS for form in forms)
        if self._listed is None:
            names = (child.name for child in storage.children(self._folder) if not child.is_folder)
            self._listed = {_stem(found) for found in names if _is_image(found)}
        return name in self._listed


class _ImagesBelow:
    """Images below a folder by path without extension, and the sub-folders of each folder; recent lookups are
    cached."""

    def __init__(self, folder: str):
        def at(below: str) -> str:
            return f"{folder}/{below}".rstrip("/")

        @functools.lru_cache(maxsize=64)
        def images(below: str) -> Container[str]:
            return _ImagesInFolder(at(below)) if storage.kind(at(below)) == "folder" else ()

        @functools.lru_cache(maxsize=64)
        def folders_in(below: str) -> list[str]:
            folders = (child.name for child in storage.children(at(below)) if child.is_folder)
            return sorted(name for name in folders if not is_passed_over(name, is_folder=True))

        self._images, self.folders_in = images, folders_in

    def __contains__(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        return name in self._images(folder)


class TarSource:
    """Images in tar archives (WebDataset), archive after archive, in stored order."""

    def __init__(self, spec: str, paths: Sequence[str], folders: bool):
        self._spec, self._paths, self._folders = spec, paths, folders
        self.skipped = SkippedItems()

    def items(self) -> Iterator[Item]:
        self.skipped = SkippedItems()
        for path in self._paths:
            mark, images = self._mark(path), _ArchiveImages(path)
            for member in tars.members(path):
                leftover = _leftover(member.name)
                if leftover is not None:
                    self.skipped.add(leftover[0], is_folder=leftover[1])
                elif not _is_image(member.name):
                    self.skipped.unread(member.name.rpartition("/")[2])
                elif images.is_mask(member.name):
                    self.skipped.masks += 1
                else:
                    yield self._item(path, member, mark)

    def _item(self, path: str, member: tars.Member, mark: str) -> Item:
        archive = path.rstrip("/").rpartition("/")[2]
        place = {"offset": member.offset, "length": member.bytes, "mark": mark}
        source = f"{archive}::{member.name}"
        if member.problem is not None:
            return failed_item(source, path, member.problem, mark)
        item = item_of(member.name, source, path, **place)
        if self._folders and item.error is None:  # checked alone first: a prefix would hide a drive letter
            item = item_of(f"{archive.removesuffix('.tar')}/{member.name}", source, path, **place)
        return item

    def stamp(self) -> dict:
        digest = hashlib.sha256()
        for path in self._paths:
            digest.update(_stamped(path, self._mark(path)))
        return {"kind": "tars", "path": self._spec, "files": len(self._paths), "folders": self._folders,
                "digest": digest.hexdigest()}

    def _mark(self, path: str) -> str:
        try:
            return storage.mark(path)
        except OSError as error:
            raise UserError(f"--source {self._spec}: {path}: {storage.describe_error(error)}") from None


class _ArchiveImages:
    """Names of an archive's images without extension; read on first use, so only where needed."""

    def __init__(self, path: str):
        self._path, self._names, self._folders_in = path, None, None

    def is_mask(self, name: str) -> bool:
        """True for a member that, by its name, is the mask of an image in its folder, and for a PNG that is
        the mask of one in a sibling folder."""
        if image_of_mask(_stem(name), self) is not None:
            return True
        return name.lower().endswith(".png") and (
            image_of_mask_in_folder(_stem(name), self, self._folders) is not None)

    def _folders(self, folder: str) -> Iterable[str]:
        self._read()
        return self._folders_in(folder)

    def __contains__(self, name: str) -> bool:
        self._read()
        return name in self._names

    def _read(self) -> None:
        if self._names is None:
            stems = {_stem(member.name) for member in tars.members(self._path) if _is_image(member.name)}
            # WebDataset samples may name both fields: x.rgb.png and x.mask.png.
            self._names = stems | {stem.rpartition(".")[0] for stem in stems
                                   if stem.lower().endswith(_IMAGE_FIELDS)}
            self._folders_in = folders_of(stems)


def _leftover(name: str) -> tuple[str, bool] | None:
    """(part, True for a folder) of a member's name that causes it to be skipped; None otherwise."""
    *folders, last = name.split("/")
    for part in folders:
        if part not in (".", "..") and is_passed_over(part, is_folder=True):
            return part, True
    return (last, False) if is_leftover(last, is_folder=False) or re.match(r"\.(?!\.)", last) else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def expand_braces(spec: str) -> list[str]:
    """Expands `a-{000..127}.tar` and `{x,y}.tar` to names, in order; leading zeros are kept."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", spec)
    if not found:
        return [spec]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if low > high or high - low >= _MOST_BRACES:
            raise UserError(f"--source {spec}: {{{first}..{last}}} is not an ascending range of at most "
                            f"{_MOST_BRACES} numbers")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        inner = [f"{number:0{width}d}" for number in range(low, high + 1)]
    else:
        inner = words.split(",")
    tails = expand_braces(spec[found.end():])
    return [f"{spec[:found.start()]}{middle}{tail}" for middle in inner for tail in tails]


def _stamped(name: str, mark: str) -> bytes:
    return f"{name}\0{mark.replace(' ', chr(0), 1)}\n".encode()


def _absolute(path: str) -> str:
    return path if storage.is_url(path) else os.path.abspath(os.path.expanduser(path))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _sorted(entries: Iterator[tuple[str, bool, str]]) -> Iterator[tuple[str, bool, str]]:
    """Sorts any number of entries; above `_RUN`, by merging sorted runs on disk."""
    runs: list[IO[bytes]] = []
    while run := sorted(itertools.islice(entries, _RUN)):
        if not runs and len(run) < _RUN:
            yield from run
            return
        file = tempfile.TemporaryFile()
        for entry in run:
            pickle.dump(entry, file)
        file.seek(0)
        runs.append(file)
    yield from heapq.merge(*map(_loaded, runs))


def _loaded(file: IO[bytes]) -> Iterator[tuple[str, bool, str]]:
    with file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
