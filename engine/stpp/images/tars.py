"""Tar archives without unpacking: where the bytes of each member lie; and archives of masks, always the same
bytes."""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from stpp.errors import UserError
from stpp.images import storage

_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
               b"PK\3\4": "zip", b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf\x27\x1c": "7-Zip"}
"""First bytes of files that are often given a name in `.tar` all the same."""


class Member(NamedTuple):
    """An entry of an archive."""

    name: str
    """As it stands there: it may be hostile."""
    offset: int
    bytes: int
    problem: str | None
    """Why it is no file with its bytes in the archive; None if it is one, or a hard link to one."""


def members(path: str) -> Iterator[Member]:
    """All entries of an archive but its folders, in their order; only headers are read.

    Archives put together with `cat` are read one after the other.

    Raises:
        UserError: no tar archive, or one that is cut short or damaged: what it lacks cannot be known.
    """
    links: dict[str, tuple[int, int]] | None = None
    for found in _entries(path):
        if found.islnk():
            links = _link_targets(path) if links is None else links
            target = links.get(posixpath.normpath(found.linkname))
            lost = f"it is a hard link to {found.linkname!r}, which is no file of the archive"
            yield Member(found.name, *(target or (0, 0)), None if target else lost)
        else:
            yield Member(found.name, found.offset_data, found.size, _problem(found))


def _problem(found: tarfile.TarInfo) -> str | None:
    if found.issparse():
        return "it is stored in pieces (a sparse file); write the archive without --sparse"
    if found.issym():
        return "it is a symbolic link, not an image; write the archive with --dereference"
    return None if found.isreg() else "it is a special file, not an image"


def _entries(path: str) -> Iterator[tarfile.TarInfo]:
    """Headers of all that is no folder."""
    try:
        with storage.opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(8)
            if kind := compression(head):
                raise UserError(f"{path}: compressed with {kind}, though its name ends in .tar; unpack it "
                                "into a plain .tar (images are compressed already)")
            start: int | None = 0
            while start is not None:
                end = yield from _archive(file, start, size)
                start = _next_archive(file, end, size, since=start)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar archive ({error}); fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: {storage.why(error)}") from None


def compression(head: bytes) -> str | None:
    """What a file that begins so is compressed with; None: nothing that is known."""
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


def _archive(file: IO[bytes], start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Headers of the archive that begins at a byte; returns the byte after its last member."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
        while (found := archive.next()) is not None:
            archive.members.clear()  # it would hold every header of the archive
            if archive.offset > size:
                raise tarfile.ReadError(f"{found.name!r} is cut short")
            if not found.isdir():
                yield found
        return archive.offset


def _next_archive(file: IO[bytes], end: int, size: int, *, since: int) -> int | None:
    """First byte of an archive that follows on one that ended; None where only zeros follow.

    `tarfile` takes a damaged header after the first, and the end of the file, for the end of the archive.
    """
    if end >= size:
        raise tarfile.ReadError(f"it stops after {size} bytes without the zeros that end an archive: it was "
                                "cut there, or is still being written")
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"it goes on at byte {end} with what is no archive" if end == since
                                else f"it is damaged or cut short at byte {end}")
    at = end + _BLOCK
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return at + (len(block) - len(block.lstrip(b"\0"))) // _BLOCK * _BLOCK
        at += len(block)
    return None


def _link_targets(path: str) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of the files that hard links of an archive name; its headers are read twice for it."""
    wanted = {posixpath.normpath(found.linkname) for found in _entries(path) if found.islnk()}
    files = (found for found in _entries(path) if not found.islnk() and _problem(found) is None)
    return {name: (found.offset_data, found.size) for found in files
            if (name := posixpath.normpath(found.name)) in wanted}


def entry(name: str, data: bytes) -> bytes:
    """A member as bytes of an archive: header, data, padding; nothing in it depends on when or by whom."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.PAX_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


END = b"\0" * 2 * _BLOCK
"""What an archive ends with."""
