"""Reading bytes from where a corpus lies: local files, or anything that fsspec has a URL for.

The one module that uses fsspec; it is imported when the first URL is met.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar

from stpp.errors import UserError

T = TypeVar("T")
ATTEMPTS = 4
"""How often a remote read is tried, with a pause that doubles from PAUSE_S."""
PAUSE_S = 0.5
ABSENT = "-1 "
"""Mark of a file that is not there."""
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Failures of this process, not of the file that it was about to open."""


class Child(NamedTuple):
    """An entry of a folder."""

    name: str
    is_folder: bool
    mark: str
    """See `mark`; empty for folders."""


def is_url(path: str) -> bool:
    """Whether fsspec is to open this."""
    return "://" in path


def kind(path: str) -> str | None:
    """ "folder", "file", or None where there is neither."""
    if not is_url(path):
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    fs, inside = _remote(path)
    return _asked(path, lambda: "folder" if fs.isdir(inside) else "file" if fs.exists(inside) else None)


def children(folder: str) -> Iterator[Child]:
    """Entries of a folder in no order; of a local folder as the system yields them, without holding them
    all."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # an entry that went away meanwhile
                    is_folder = entry.is_dir()
                    yield Child(entry.name, is_folder, "" if is_folder else _local_mark(entry))
        return
    fs, inside = _remote(folder)
    for entry in _asked(folder, lambda: fs.ls(inside, detail=True)):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry["name"].strip("/") != inside.strip("/") and name:
            yield Child(name, entry["type"] == "directory", _remote_mark(entry))


def size(path: str) -> int:
    """Bytes of a file.

    Raises:
        OSError: there is no such file.
    """
    return int(mark(path).partition(" ")[0])


def mark(path: str) -> str:
    """Size and time of change of a file: a text that changes when it is written anew, if the store tells.

    Raises:
        OSError: there is no such file.
    """
    if not is_url(path):
        found = os.stat(path)
        return f"{found.st_size} {found.st_mtime_ns}"
    fs, inside = _remote(path)
    return _remote_mark(_retried(lambda: fs.info(inside)))


def _local_mark(entry: os.DirEntry) -> str:
    try:
        found = entry.stat()
    except OSError:  # a link to nowhere
        return ABSENT
    return f"{found.st_size} {found.st_mtime_ns}"


def _remote_mark(info: dict) -> str:
    changed = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
    return f"{info.get('size') or 0} {changed}"


def opened(path: str) -> IO[bytes]:
    """A file opened for reading and seeking.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_url(path):
        return open(path, "rb")
    fs, inside = _remote(path)
    return _retried(lambda: fs.open(inside, "rb"))


def read(path: str, offset: int = -1, length: int = -1) -> bytes:
    """Bytes of a file.

    Args:
        offset: first byte; -1 for the beginning.
        length: at most so many; -1 for all that follow.

    Raises:
        OSError: the file cannot be read. A remote one is tried several times.
        RuntimeError: this process has run out of file handles or memory.
    """
    start = max(offset, 0)
    try:
        if not is_url(path):
            with open(path, "rb", buffering=0) as file:
                if start:
                    file.seek(start)
                return _all_of(file, length)
        fs, inside = _remote(path)
        return _retried(lambda: fs.cat_file(inside, start=start, end=None if length < 0 else start + length))
    except OSError as error:
        if error.errno in _OURS:
            raise RuntimeError(f"{path}: {error.strerror}") from error
        raise


def why(error: OSError) -> str:
    """The reason of a failed read in a few words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"cannot be read ({error.strerror or ' '.join(str(error).split())[:120] or type(error).__name__})"


def _all_of(file: IO[bytes], length: int) -> bytes:
    """Raw files may return less than asked for."""
    if length < 0:
        return file.read()
    parts, left = [], length
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _remote(url: str):
    """(file system, path in it) of a URL.

    Raises:
        UserError: fsspec, or its part for this kind of URL, is not installed; or there is no such kind.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: URLs need fsspec, which is not installed; pip install fsspec, and what it "
                        f"needs for {url.partition(':')[0]}") from None
    try:
        # Its cache of listings would grow with the corpus.
        return url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: fsspec cannot open it ({' '.join(str(error).split())[:200]})") from None


def _asked(url: str, ask: Callable[[], T]) -> T:
    """A question about what the user named: its failure is an answer to the user."""
    try:
        return _retried(ask)
    except OSError as error:
        raise UserError(f"{url}: {why(error)}; check the address and the access to it") from None


def _retried(call: Callable[[], T]) -> T:
    """Tries a remote call again unless the answer is final.

    Raises:
        OSError: whatever the store's own library raised at last.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
            raise
        except Exception as error:  # every store has errors of its own
            if attempt == ATTEMPTS - 1:
                raise error if isinstance(error, OSError) else OSError(str(error)) from error
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError
