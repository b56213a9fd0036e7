"""Images of a corpus: the location of their bytes, and the keys of their masks."""

import hashlib
import sys
from dataclasses import dataclass, field

from stpp.errors import UserError
from stpp.images import storage
from stpp.images.folders import SkippedFiles
from stpp.images.names import mask_key, printable, quoted


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a corpus."""

    key: str
    """Path of its mask below the output, without `.png`, with forward slashes."""
    source: str
    """Name of the image in the source: path below the folder, line of the list, `archive::member`."""
    file: str
    """Path or URL of the file with its bytes."""
    offset: int = -1
    """First byte in that file; -1: the file is the image."""
    bytes: int = -1
    """Length; -1: the whole file."""
    error: str | None = None
    """Reason, known from the name alone, why it cannot be labelled."""
    mark: str = field(default="", compare=False)
    """Size and modification time of the file when listed (`storage.mark`); empty: not checked."""

    def read(self, length: int = -1) -> bytes:
        """Reads its bytes, or only the first `length`.

        Raises:
            OSError: unreadable file.
        """
        wanted = self.bytes if length < 0 else length if self.bytes < 0 else min(length, self.bytes)
        return storage.read(self.file, self.offset, wanted)

    def read_end(self, length: int) -> bytes:
        """Reads its last `length` bytes, or all of a shorter image.

        Raises:
            OSError: unreadable file.
        """
        size = self.bytes if self.bytes >= 0 else storage.size(self.file)
        start = max(size - length, 0)
        return storage.read(self.file, max(self.offset, 0) + start, size - start)


@dataclass
class SkippedItems(SkippedFiles):
    """Counts of files and lines skipped in a corpus."""

    masks: int = 0
    """Files that, by their names, are masks of images in the same folder or in a sibling folder."""
    repeated: int = 0
    """Repeated lines of a list."""

    def line(self) -> str | None:
        """All counts in one line; None if nothing was skipped."""
        parts = self.lines()
        parts += [f"{self.masks} masks of listed images"] if self.masks else []
        parts += [f"{self.repeated} repeated lines"] if self.repeated else []
        return f"skipped: {'; '.join(parts)}" if parts else None


def content_hash(data: bytes) -> int:
    """64-bit hash of an image's bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def item_of(name: str, source: str, file: str, *, offset: int = -1, length: int = -1, mark: str = "") -> Item:
    """Item of an image called `name`; with an error if the name cannot be a path below the output.

    Raises:
        UserError: the shell's locale hides non-ASCII names.
    """
    require_readable_name(name, "an image")
    try:
        key = mask_key(name)
        printable_file = file.encode().decode()
    except ValueError as error:
        reason = "its name is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        return failed_item(source, file, reason, mark)
    return Item(key=key, source=printable(source), file=printable_file, offset=offset, bytes=length,
                mark=mark)


def failed_item(source: str, file: str, reason: str, mark: str = "") -> Item:
    """Item of an image that cannot have a mask; its key only identifies it."""
    return Item(key=quoted(source), source=printable(source), file=printable(file), error=reason, mark=mark)


def require_readable_name(name: str, subject: str) -> None:
    """Rejects a non-ASCII name if the locale is not UTF-8, because it would seem damaged.

    Raises:
        UserError: tells how to set the locale.
    """
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and not name.isascii():
        raise UserError(f"{subject} is called {printable(name)}, which needs UTF-8, but this shell's locale "
                        f"uses {sys.getfilesystemencoding()}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8")
