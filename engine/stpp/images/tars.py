"""Tar archives without unpacking: where the bytes of each member lie; and archives of masks, always the same bytes."""

import io
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from stpp.errors import UserError
from stpp.images import storage

_BLOCK = 512


class Member(NamedTuple):
    """An entry of an archive."""

    name: str
    """As it stands there: it may be hostile."""
    offset: int
    bytes: int
    is_file: bool
    """A plain file, with its bytes in the archive; links, folders and devices are not."""


def members(path: str) -> Iterator[Member]:
    """All entries of an archive but its folders, in their order; only headers are read.

    Raises:
        UserError: no tar archive, or one that is cut short: what it lacks cannot be known.
    """
    try:
        with storage.opened(path) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as archive:
                while (found := archive.next()) is not None:
                    archive.members.clear()  # it would hold every header of the archive
                    if found.offset_data + found.size > size:
                        raise tarfile.ReadError(f"{found.name!r} is cut short")
                    if not found.isdir():
                        yield Member(found.name, found.offset_data, found.size, found.isreg() and not found.issparse())
                _check_end(file, archive.offset, size)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar archive ({error}); fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: {storage.why(error)}") from None


def _check_end(file: IO[bytes], offset: int, size: int) -> None:
    """`tarfile` takes a damaged header after the first for the end of the archive."""
    file.seek(min(offset, size))
    if file.read(_BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"it is damaged or cut short at byte {offset}")


def entry(name: str, data: bytes) -> bytes:
    """A member as bytes of an archive: header, data, padding; nothing in it depends on when or by whom."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.PAX_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


END = b"\0" * 2 * _BLOCK
"""What an archive ends with."""
