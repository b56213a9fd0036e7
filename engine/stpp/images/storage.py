"""Byte access to a corpus: local files, or any fsspec URL.

The one module that imports fsspec, on the first URL.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple, TypeVar

from stpp.errors import UserError

T = TypeVar("T")
ATTEMPTS = 4
"""Attempts per remote read, with a pause that doubles from PAUSE_S."""
PAUSE_S = 0.5
ABSENT = "-1 "
"""Mark of a missing file."""
_PROCESS_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this process rather than of the file being opened."""


class Child(NamedTuple):
    """An entry of a folder."""

    name: str
    is_folder: bool
    mark: str
    """Result of `mark`; empty for folders."""


def is_url(path: str) -> bool:
    """True for paths that fsspec opens."""
    return "://" in path


def kind(path: str) -> str | None:
    """ "folder", "file", or None if neither exists."""
    if not is_url(path):
        return "folder" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    fs, path_in = _remote(path)
    return _query(path, lambda: "folder" if fs.isdir(path_in) else "file" if fs.exists(path_in) else None)


def children(folder: str) -> Iterator[Child]:
    """Entries of a folder, unsorted; local entries are streamed."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link into a folder that may not be entered, or to itself
                    is_folder = False
                yield Child(entry.name, is_folder, "" if is_folder else _local_mark(entry))
        return
    fs, inside = _remote(folder)
    for entry in _query(folder, lambda: fs.ls(inside, detail=True)):
        name = entry["name"].rstrip("/").rpartition("/")[2]
        if entry["name"].strip("/") != inside.strip("/") and name:
            yield Child(name, entry["type"] == "directory", _remote_mark(entry))


def size(path: str) -> int:
    """Size of a file in bytes.

    Raises:
        OSError: no such file.
    """
    return int(mark(path).partition(" ")[0])


def mark(path: str) -> str:
    """Size and modification time of a file as text, which changes when the file is rewritten, if the store
    records it.

    Raises:
        OSError: no such file.
    """
    if not is_url(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    fs, inside = _remote(path)
    return _remote_mark(_retried(lambda: fs.info(inside)))


def _local_mark(entry: os.DirEntry) -> str:
    try:
        status = entry.stat()
    except OSError:  # a broken link
        return ABSENT
    return f"{status.st_size} {status.st_mtime_ns}"


def _remote_mark(info: dict) -> str:
    changed = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
    return f"{info.get('size') or 0} {changed}"


def opened(path: str) -> IO[bytes]:
    """Opens a file for reading and seeking.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_url(path):
        return open(path, "rb")
    fs, inside = _remote(path)
    return _retried(lambda: fs.open(inside, "rb"))


def read(path: str, offset: int = -1, length: int = -1) -> bytes:
    """Reads bytes of a file.

    Args:
        offset: first byte; -1 for the beginning.
        length: maximum number of bytes; -1 for all that follow.

    Raises:
        OSError: unreadable file. Remote reads are retried.
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
        if error.errno in _PROCESS_ERRORS:
            raise RuntimeError(f"{path}: {error.strerror}") from error
        raise


def describe_error(error: OSError) -> str:
    """Short reason of a failed read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"cannot be read ({error.strerror or ' '.join(str(error).split())[:120] or type(error).__name__})"


def _all_of(file: IO[bytes], length: int) -> bytes:
    """Reads exactly `length` bytes, as far as available; raw reads may return fewer."""
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
        UserError: fsspec, or its backend for this kind of URL, is missing; or the kind is unknown.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"{url}: URLs need fsspec, which is not installed; pip install fsspec, and its "
                        f"backend for {url.partition(':')[0]}") from None
    try:
        # fsspec's listing cache would grow with the corpus.
        return url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: fsspec cannot open it ({' '.join(str(error).split())[:200]})") from None


def _query(url: str, ask: Callable[[], T]) -> T:
    """Answer of a query about a user-supplied URL; failures become a UserError."""
    try:
        return _retried(ask)
    except OSError as error:
        raise UserError(f"{url}: {describe_error(error)}; check the address and your access to it") from None


def _retried(call: Callable[[], T]) -> T:
    """Retries a remote call unless the error is final.

    Raises:
        OSError: the last error of the store's library.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, UserError):
            raise
        except Exception as error:  # each store raises its own errors
            if attempt == ATTEMPTS - 1:
                raise error if isinstance(error, OSError) else OSError(str(error)) from error
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError
