"""An image of a corpus: where its bytes lie, and the key that its mask will have."""

import hashlib
import sys
from dataclasses import dataclass, field

from stpp.errors import UserError
from stpp.images import storage
from stpp.images.folders import PassedOver
from stpp.images.names import mask_key, printable, quoted


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
    mark: str = field(default="", compare=False)
    """Size and time of change of the file when it was listed (`storage.mark`); empty: not looked at."""

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
        size = self.bytes if self.bytes >= 0 else storage.size(self.file)
        start = max(size - length, 0)
        return storage.read(self.file, max(self.offset, 0) + start, size - start)


@dataclass
class Passed(PassedOver):
    """Counts of what a walk through a corpus did not take."""

    masks: int = 0
    """Files that are by their names masks of images beside them, or in a folder beside theirs."""
    repeated: int = 0
    """Lines of a list that repeat one before."""

    def line(self) -> str | None:
        """All in one line; None if all was taken."""
        found = self.lines()
        found += [f"{self.masks} masks of images beside them"] if self.masks else []
        found += [f"{self.repeated} lines that repeat one before"] if self.repeated else []
        return f"skipped: {'; '.join(found)}" if found else None


def content_hash(data: bytes) -> int:
    """64 bits that tell the bytes of one image from those of another, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def named(name: str, source: str, file: str, *, offset: int = -1, length: int = -1, mark: str = "") -> Item:
    """The item of an image called `name`; one with an error if the name cannot be a path below the output.

    Raises:
        UserError: the shell's locale hides names that are not plain ASCII.
    """
    require_readable_name(name, "an image")
    try:
        key = mask_key(name)
        printable_file = file.encode().decode()
    except ValueError as error:
        reason = "its name is not UTF-8" if isinstance(error, UnicodeError) else str(error)
        return unnamed(source, file, reason, mark)
    return Item(key=key, source=printable(source), file=printable_file, offset=offset, bytes=length,
                mark=mark)


def unnamed(source: str, file: str, reason: str, mark: str = "") -> Item:
    """The item of an image that cannot have a mask; its key only tells it from others."""
    return Item(key=quoted(source), source=printable(source), file=printable(file), error=reason, mark=mark)


def require_readable_name(name: str, called: str) -> None:
    """Refuses to go on where the locale is not UTF-8 and a name needs it: it would be taken for damaged.

    Raises:
        UserError: tells how to set the locale.
    """
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8" and not name.isascii():
        raise UserError(f"{called} is called {printable(name)}, which needs UTF-8, and this shell's locale "
                        f"has {sys.getfilesystemencoding()}; set PYTHONUTF8=1 or LC_ALL=C.UTF-8")
