"""Corpora: folders, lists and tar archives as a stream of items, in memory that does not grow with their number.

An item is where the bytes of one image lie, and the key that its mask will have.
"""

import hashlib
import heapq
import itertools
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from stpp.errors import UserError
from stpp.images import storage, tars
from stpp.images.image_file import IMAGE_EXTENSIONS
from stpp.images.names import mask_key, printable, quoted

EXTENSIONS = IMAGE_EXTENSIONS
"""What counts as an image in folders and archives, in any case of letters. A list says itself what its images are."""
_RUN = 50_000
"""Names of one folder that are sorted in memory; more are sorted in runs on disk."""
_MOST_BRACES = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a corpus."""

    key: str
    """Name of its mask without `.png`: forward slashes, below the output."""
    source: str
    """The image as the source names it: path below the folder, line of the list, `archive::member`."""
    file: str
    """Path or URL of the file that its bytes lie in."""
    offset: int = -1
    """First byte in that file; -1: the file is the image."""
    bytes: int = -1
    """Length; -1: as long as the file."""
    error: str | None = None
    """Why it cannot be labelled, where the name alone tells."""

    def read(self, length: int = -1) -> bytes:
        """Its bytes, or only the first `length`.

        Raises:
            OSError: they cannot be read.
        """
        wanted = self.bytes if length < 0 else length if self.bytes < 0 else min(length, self.bytes)
        return storage.read(self.file, self.offset, wanted)

    def read_end(self, length: int) -> bytes:
        """Its last `length` bytes, or all of them where it has fewer.

        Raises:
            OSError: they cannot be read.
        """
        size = self.bytes if self.bytes >= 0 else storage.stamp(self.file)[0]
        start = max(size - length, 0)
        return storage.read(self.file, max(self.offset, 0) + start, size - start)


class Source(Protocol):
    """Where a corpus comes from."""

    def items(self) -> Iterator[Item]:
        """Every image once, always in the same order."""
        ...

    def stamp(self) -> dict:
        """What tells this corpus from another, and from itself after a change: JSON values."""
        ...


def open_source(spec: str, *, root: Path | None = None, tar_folders: bool = False) -> Source:
    """The corpus that `--source` names.

    Args:
        spec: a folder, a list file, or tar archives (`shards/{000..127}.tar`); a local path or a URL of fsspec.
        root: what relative paths of a list are relative to; None: the folder that the list lies in.
        tar_folders: put the masks of each archive into a folder of the archive's name.

    Raises:
        UserError: there is nothing of this name, or nothing that can be read.
    """
    paths = expand_braces(spec)
    if re.search(r"\.(tar\.\w+|tgz|tbz2?|txz)$", spec):
        raise UserError(f"--source {spec}: compressed archives cannot be read at any place in them; give plain .tar files "
                        "(images are compressed already)")
    if spec.endswith(".tar"):
        return TarSource(spec, [_absolute(path) for path in paths], tar_folders)
    if len(paths) > 1:
        raise UserError(f"--source {spec}: braces number .tar archives; give a folder, a list file or .tar archives")
    found = storage.kind(spec)
    if found is None:
        raise UserError(f"--source {spec}: there is no such folder, list file or .tar archive")
    if found == "folder":
        return FolderSource(_absolute(spec))
    return ListSource(_absolute(spec), _absolute(str(root)) if root else os.path.dirname(_absolute(spec)))


class FolderSource:
    """All images below a folder, sub-folders included, in the order of their names; hidden files are passed over."""

    def __init__(self, folder: str):
        self._folder = folder.rstrip("/") if not folder.endswith("://") else folder

    def items(self) -> Iterator[Item]:
        for name in self._names(""):
            yield named(name, name, f"{self._folder}/{name}")

    def stamp(self) -> dict:
        """A digest of names, sizes and times of change: the folder is walked for it."""
        digest, count = hashlib.sha256(), 0
        for name in self._names(""):
            count += 1
            try:
                size, mark = storage.stamp(f"{self._folder}/{name}")
            except OSError:
                size, mark = -1, ""
            digest.update(f"{printable(name)}\0{size}\0{mark}\n".encode())
        return {"kind": "folder", "path": self._folder, "files": count, "digest": digest.hexdigest()}

    def _names(self, below: str, above: tuple = ()) -> Iterator[str]:
        folder = f"{self._folder}/{below}".rstrip("/")
        if not storage.is_url(folder):
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in above:
                return  # a link to a folder that it lies in
            above = (*above, (here.st_dev, here.st_ino))
        entries = ((child.name, child.is_folder) for child in storage.children(folder)
                   if not child.name.startswith(".") and child.name != "__MACOSX"
                   and (child.is_folder or _is_image(child.name)))
        for name, is_folder in _sorted(entries):
            if is_folder:
                yield from self._names(f"{below}{name}/", above)
            else:
                yield f"{below}{name}"


class ListSource:
    """The images that a text file names, one a line (`image`, or `image mask` as split files have it)."""

    def __init__(self, path: str, root: str):
        self._path, self._root = path, root

    def items(self) -> Iterator[Item]:
        with storage.opened(self._path) as file:
            for number, raw in enumerate(file):
                text = raw.decode("utf-8-sig" if number == 0 else "utf-8", "surrogateescape").strip("\r\n")
                if text.strip():
                    yield self._item(text.strip())

    def _item(self, text: str) -> Item:
        if storage.is_url(text):
            return named(text.partition("://")[2].lstrip("/"), text, text)
        if len(text.split()) > 1 and not os.path.exists(os.path.join(self._root, text)):
            # `image mask`: names may hold spaces, so the image is what ends like one.
            cut = re.match(rf"(.*?({'|'.join(map(re.escape, EXTENSIONS))}))\s+\S.*$", text, re.IGNORECASE)
            text = cut[1] if cut else text
        name = text.lstrip("/") if os.path.isabs(text) else text
        remote = storage.is_url(self._root) and not os.path.isabs(text)
        return named(name, text, f"{self._root}/{text}" if remote else os.path.join(self._root, text))

    def stamp(self) -> dict:
        digest = hashlib.sha256()
        with storage.opened(self._path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {"kind": "list", "path": self._path, "root": self._root, "digest": digest.hexdigest()}


class TarSource:
    """The images in tar archives (WebDataset), archive after archive, in the order that they lie there."""

    def __init__(self, spec: str, paths: Sequence[str], folders: bool):
        self._spec, self._paths, self._folders = spec, paths, folders

    def items(self) -> Iterator[Item]:
        for path in self._paths:
            archive = path.rstrip("/").rpartition("/")[2]
            for member in tars.members(path):
                if not _is_image(member.name) or re.match(r"\.(?!\.)", member.name.rpartition("/")[2]):
                    continue
                source = f"{archive}::{member.name}"
                if not member.is_file:
                    yield _unnamed(source, path, "it is a link or a special file, not an image")
                    continue
                item = named(member.name, source, path, offset=member.offset, length=member.bytes)
                if self._folders and item.error is None:  # judged alone first: a folder before it would hide a drive
                    name = f"{archive.removesuffix('.tar')}/{member.name}"
                    item = named(name, source, path, offset=member.offset, length=member.bytes)
                yield item

    def stamp(self) -> dict:
        digest = hashlib.sha256()
        for path in self._paths:
            try:
                size, mark = storage.stamp(path)
            except OSError as error:
                raise UserError(f"--source {self._spec}: {path}: {storage.why(error)}") from None
            digest.update(f"{path}\0{size}\0{mark}\n".encode())
        return {"kind": "tars", "path": self._spec, "files": len(self._paths), "folders": self._folders,
                "digest": digest.hexdigest()}


def named(name: str, source: str, file: str, *, offset: int = -1, length: int = -1) -> Item:
    """The item of an image called `name`; one with its error if the name cannot become a path below the output."""
    try:
        key = mask_key(name)
        printable_file = file.encode().decode()
    except ValueError as error:
        reason = "its name is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        return _unnamed(source, file, reason)
    return Item(key=key, source=printable(source), file=printable_file, offset=offset, bytes=length)


def _unnamed(source: str, file: str, reason: str) -> Item:
    return Item(key=quoted(source), source=printable(source), file=printable(file), error=reason)


def expand_braces(spec: str) -> list[str]:
    """`a-{000..127}.tar` and `{x,y}.tar` as the names they stand for, in order; zeros in front are kept."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", spec)
    if not found:
        return [spec]
    first, last, words = found.groups()
    if words is None:
        low, high = int(first), int(last)
        if low > high or high - low >= _MOST_BRACES:
            raise UserError(f"--source {spec}: {{{first}..{last}}} is no range that rises, of at most {_MOST_BRACES} numbers")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        inner = [f"{number:0{width}d}" for number in range(low, high + 1)]
    else:
        inner = words.split(",")
    tails = expand_braces(spec[found.end():])
    return [f"{spec[:found.start()]}{middle}{tail}" for middle in inner for tail in tails]


def _absolute(path: str) -> str:
    return path if storage.is_url(path) else os.path.abspath(os.path.expanduser(path))


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _sorted(entries: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
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


def _loaded(file: IO[bytes]) -> Iterator[tuple[str, bool]]:
    with file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
