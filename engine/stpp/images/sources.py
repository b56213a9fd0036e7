"""Corpora: folders, lists and tar archives as a stream of items.

Memory does not grow with their number.
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
from stpp.images.items import Item, Passed, named, require_readable_name, unnamed
from stpp.images.lists import ListSource
from stpp.images.names import printable

_RUN = 50_000
"""Names of one folder that are sorted in memory; more are sorted in runs on disk."""
_IMAGE_FIELDS = (".image", ".img", ".rgb", ".photo", ".input")
"""Fields of a sample of WebDataset that hold its image."""
_MOST_BRACES = 10_000_000


class Source(Protocol):
    """Where a corpus comes from."""

    passed: Passed
    """What the last walk through `items` passed over."""

    def items(self) -> Iterator[Item]:
        """Every image once, always in the same order."""
        ...

    def stamp(self) -> dict:
        """What tells this corpus from another, and from itself after a change: JSON values."""
        ...


def open_source(spec: str, *, root: Path | None = None, tar_folders: bool = False) -> Source:
    """The corpus that `--source` names.

    Args:
        spec: a folder, a list file, or tar archives (`shards/{000..127}.tar`); a local path or a URL of
            fsspec. A folder that is there is a folder, whatever its name.
        root: what relative paths of a list are relative to; None: the folder that the list lies in.
        tar_folders: put the masks of each archive into a folder of the archive's name.

    Raises:
        UserError: there is nothing of this name, or nothing that can be read.
    """
    require_readable_name(spec, "--source")
    local = None if storage.is_url(spec) else storage.kind(_absolute(spec))
    if local == "folder":
        return FolderSource(_absolute(spec))
    paths = [spec] if local else expand_braces(spec)
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", spec):
        raise UserError(f"--source {spec}: compressed archives cannot be read at any place in them; give "
                        "plain .tar files (images are compressed already)")
    if spec.endswith(".tar"):
        return TarSource(spec, [_absolute(path) for path in paths], tar_folders)
    if len(paths) > 1:
        raise UserError(f"--source {spec}: braces number .tar archives; give a folder, a list file or .tar "
                        "archives")
    found = local or storage.kind(spec)
    if found is None:
        raise UserError(f"--source {spec}: there is no such folder, list file or .tar archive")
    if found == "folder":
        return FolderSource(_absolute(spec))
    return ListSource(_absolute(spec), _absolute(str(root)) if root else os.path.dirname(_absolute(spec)))


class FolderSource:
    """All images below a folder, sub-folders included, in the order of their names."""

    def __init__(self, folder: str):
        self._folder = folder.rstrip("/") if not folder.endswith("://") else folder
        self._below = _Below(self._folder)
        self.passed = Passed()

    def items(self) -> Iterator[Item]:
        self.passed = Passed()
        for name, mark in self._names(""):
            yield named(name, name, f"{self._folder}/{name}", mark=mark)

    def stamp(self) -> dict:
        """A digest of names, sizes and times of change: the folder is walked for it."""
        digest, count = hashlib.sha256(), 0
        for name, mark in self._names(""):
            count += 1
            digest.update(_stamped(printable(name), mark))
        return {"kind": "folder", "path": self._folder, "files": count, "digest": digest.hexdigest()}

    def _names(self, below: str, above: tuple = ()) -> Iterator[tuple[str, str]]:
        """Names below the folder, and their marks."""
        folder = f"{self._folder}/{below}".rstrip("/")
        try:
            if not storage.is_url(folder):
                here = os.stat(folder)
                if (here.st_dev, here.st_ino) in above:
                    return  # a link to a folder that it lies in
                above = (*above, (here.st_dev, here.st_ino))
            for name, is_folder, mark in _sorted(self._taken(folder)):
                if is_folder:
                    yield from self._names(f"{below}{name}/", above)
                else:
                    yield f"{below}{name}", mark
        except OSError as error:
            raise UserError(f"{folder}: {storage.why(error)}; the images in it would be left out") from None

    def _taken(self, folder: str) -> Iterator[tuple[str, bool, str]]:
        beside = _BesideIn(folder)
        for child in storage.children(folder):
            if self.passed.add(child.name, is_folder=child.is_folder):
                continue
            if not child.is_folder and self._is_mask(folder, child.name, beside):
                self.passed.masks += 1
            elif child.is_folder or _is_image(child.name):
                yield tuple(child)
            else:
                self.passed.unread(child.name)

    def _is_mask(self, folder: str, name: str, beside: "_BesideIn") -> bool:
        """True for a PNG that is by its name the mask of an image beside it, or of one in a folder beside
        its own."""
        if not name.lower().endswith(".png"):
            return False
        below = f"{folder.removeprefix(self._folder).lstrip('/')}/{_stem(name)}".lstrip("/")
        return (image_of_mask(_stem(name), beside) is not None
                or image_of_mask_in_folder(below, self._below, self._below.folders_in) is not None)


class _BesideIn:
    """The names of a folder's images without extension. In a local folder each is looked for when it is asked
    for; a remote one is listed once, when it is first asked."""

    def __init__(self, folder: str):
        self._folder, self._listed = folder, None

    def __contains__(self, name: str) -> bool:
        if not storage.is_url(self._folder):
            return any(os.path.exists(f"{self._folder}/{name}{form}")
                       for extension in IMAGE_EXTENSIONS for form in (extension, extension.upper()))
        if self._listed is None:
            names = (child.name for child in storage.children(self._folder) if not child.is_folder)
            self._listed = {_stem(found) for found in names if _is_image(found)}
        return name in self._listed


class _Below:
    """The images below a folder by their paths without extension, and the folders in a folder; the last ones
    asked for are kept."""

    def __init__(self, folder: str):
        def at(below: str) -> str:
            return f"{folder}/{below}".rstrip("/")

        @functools.lru_cache(maxsize=64)
        def images(below: str) -> Container[str]:
            return _BesideIn(at(below)) if storage.kind(at(below)) == "folder" else ()

        @functools.lru_cache(maxsize=64)
        def folders_in(below: str) -> list[str]:
            folders = (child.name for child in storage.children(at(below)) if child.is_folder)
            return sorted(name for name in folders if not is_passed_over(name, is_folder=True))

        self._images, self.folders_in = images, folders_in

    def __contains__(self, key: str) -> bool:
        folder, _, name = key.rpartition("/")
        return name in self._images(folder)


class TarSource:
    """The images in tar archives (WebDataset), archive after archive, in the order that they lie there."""

    def __init__(self, spec: str, paths: Sequence[str], folders: bool):
        self._spec, self._paths, self._folders = spec, paths, folders
        self.passed = Passed()

    def items(self) -> Iterator[Item]:
        self.passed = Passed()
        for path in self._paths:
            mark, images = self._mark(path), _ImagesOf(path)
            for member in tars.members(path):
                left = _leftover(member.name)
                if left is not None:
                    self.passed.add(left[0], is_folder=left[1])
                elif not _is_image(member.name):
                    self.passed.unread(member.name.rpartition("/")[2])
                elif images.is_mask(member.name):
                    self.passed.masks += 1
                else:
                    yield self._item(path, member, mark)

    def _item(self, path: str, member: tars.Member, mark: str) -> Item:
        archive = path.rstrip("/").rpartition("/")[2]
        place = {"offset": member.offset, "length": member.bytes, "mark": mark}
        source = f"{archive}::{member.name}"
        if member.problem is not None:
            return unnamed(source, path, member.problem, mark)
        item = named(member.name, source, path, **place)
        if self._folders and item.error is None:  # judged alone first: a folder before it would hide a drive
            item = named(f"{archive.removesuffix('.tar')}/{member.name}", source, path, **place)
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
            raise UserError(f"--source {self._spec}: {path}: {storage.why(error)}") from None


class _ImagesOf:
    """The names of an archive's images without extension; read when first asked, so of few archives."""

    def __init__(self, path: str):
        self._path, self._names, self._folders_in = path, None, None

    def is_mask(self, name: str) -> bool:
        """True for a member that is by its name the mask of an image beside it, and for a PNG that is one of
        an image in a folder beside its own."""
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
            # The fields of a sample may both have names (WebDataset): x.rgb.png and x.mask.png.
            self._names = stems | {stem.rpartition(".")[0] for stem in stems
                                   if stem.lower().endswith(_IMAGE_FIELDS)}
            self._folders_in = folders_of(stems)


def _leftover(name: str) -> tuple[str, bool] | None:
    """(part, whether it is a folder) of a member's name that has it passed over."""
    *folders, last = name.split("/")
    for part in folders:
        if part not in (".", "..") and is_passed_over(part, is_folder=True):
            return part, True
    return (last, False) if is_leftover(last, is_folder=False) or re.match(r"\.(?!\.)", last) else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def expand_braces(spec: str) -> list[str]:
    """`a-{000..127}.tar` and `{x,y}.tar` as the names they stand for, in order; zeros in front are kept."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", spec)
    if not found:
        return [spec]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if low > high or high - low >= _MOST_BRACES:
            raise UserError(f"--source {spec}: {{{first}..{last}}} is no range that rises, of at most "
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
    """Sorts any number of entries, more than `_RUN` of them by merging runs that lie on disk."""
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
