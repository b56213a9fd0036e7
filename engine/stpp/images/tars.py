"""Tar archives without unpacking: byte ranges of the members; and reproducible archives of masks."""

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
"""First bytes of compressed files, which are often misnamed `.tar`."""


class Member(NamedTuple):
    """An entry of an archive."""

    name: str
    """Stored name; untrusted."""
    offset: int
    bytes: int
    problem: str | None
    """Reason why its bytes are not in the archive as a file; None for files and hard links to them."""


def members(path: str) -> Iterator[Member]:
    """Yields all entries of an archive except folders, in order; reads only headers.

    Archives concatenated with `cat` are read one after the other.

    Raises:
        UserError: not a tar archive, or a truncated or damaged one, whose missing content is unknown.
    """
    links: dict[str, tuple[int, int]] | None = None
    for header in _entries(path):
        if header.islnk():
            links = _link_targets(path) if links is None else links
            target = links.get(posixpath.normpath(header.linkname))
            problem = f"it is a hard link to {header.linkname!r}, which is not a file of the archive"
            yield Member(header.name, *(target or (0, 0)), None if target else problem)
        else:
            yield Member(header.name, header.offset_data, header.size, _problem(header))


def _problem(header: tarfile.TarInfo) -> str | None:
    if header.issparse():
        return "it is stored in pieces (a sparse file); write the archive without --sparse"
    if header.issym():
        return "it is a symbolic link, not an image; write the archive with --dereference"
    return None if header.isreg() else "it is a special file, not an image"


def _entries(path: str) -> Iterator[tarfile.TarInfo]:
    """Headers of all entries except folders."""
    try:
        with storage.opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(8)
            if kind := compression(head):
                raise UserError(f"{path}: compressed with {kind}, though its name ends in .tar; convert it "
                                "to a plain .tar (images are compressed already)")
            start: int | None = 0
            while start is not None:
                end = yield from _archive(file, start, size)
                start = _next_archive(file, end, size, since=start)
    except (tarfile.TarError, ValueError, LookupError, OverflowError) as error:  # of extended headers
        raise UserError(f"{path}: incomplete tar archive ({error}); download or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: {storage.describe_error(error)}") from None


def compression(head: bytes) -> str | None:
    """Compression format of a file by its first bytes; None if not recognised."""
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


def _archive(file: IO[bytes], start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Headers of the archive that starts at byte `start`; returns the byte after its last member."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
        while (header := archive.next()) is not None:
            archive.members.clear()  # otherwise all headers stay in memory
            if header.size < 0 or archive.offset <= header.offset:
                raise tarfile.ReadError(f"{header.name!r} has a negative size")
            if archive.offset > size:
                raise tarfile.ReadError(f"{header.name!r} is truncated")
            if not header.isdir():
                yield header
        return archive.offset


def _next_archive(file: IO[bytes], end: int, size: int, *, since: int) -> int | None:
    """First byte of a concatenated archive after one that ended at `end`; None if only zeros follow.

    `tarfile` mistakes a damaged header after the first, and the end of the file, for the end of the archive.
    """
    if end >= size:
        raise tarfile.ReadError(f"it ends after {size} bytes without the zeros that end an archive: it is "
                                "truncated, or still being written")
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"the bytes from {end} on are not an archive" if end == since
                                else f"it is damaged or truncated at byte {end}")
    at = end + _BLOCK
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return at + (len(block) - len(block.lstrip(b"\0"))) // _BLOCK * _BLOCK
        at += len(block)
    return None


def _link_targets(path: str) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of the files that hard links name; reads the headers twice."""
    wanted = {posixpath.normpath(header.linkname) for header in _entries(path) if header.islnk()}
    files = (header for header in _entries(path) if not header.islnk() and _problem(header) is None)
    return {name: (header.offset_data, header.size) for header in files
            if (name := posixpath.normpath(header.name)) in wanted}


def entry(name: str, data: bytes) -> bytes:
    """An archive member as bytes: header, data, padding; independent of time and user."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.PAX_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


END = b"\0" * 2 * _BLOCK
"""End marker of an archive."""
