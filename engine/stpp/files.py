"""Writing files safely; the one module that opens files for writing.

A file that counts as soon as it exists (checkpoint, index, DONE.json, marker) is written completely or not at
all: `atomic`. A file covered by a marker (mask, archive) is written plainly, because the later marker records
its size and checksum: `plain`, `renamed`. Readers never accept a partial file.
"""

import codecs
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stpp.errors import UserError


@contextlib.contextmanager
def atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file that becomes `path` when the block ends without an exception.

    The data and the folder are synced, so after a crash `path` holds the old or the new content, never a
    part.

    Args:
        path: the final name; missing parent folders are created.
        mode: "wb" or "w" (UTF-8).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the user's name for it
        raise
    sync_folder(path.parent)


def create_once(path: Path, data: bytes) -> None:
    """Writes `path` atomically with owner-only permissions, unless another process already created it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename, never replaces a file
    finally:
        os.unlink(temporary)


def plain(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file that becomes valid only through a later write: a marker or a rename."""
    return open(path, "wb")


@contextlib.contextmanager
def renamed(path: str | os.PathLike, temporary: str | os.PathLike | None = None) -> Iterator[IO[bytes]]:
    """Opens `temporary` (None: a hidden file in the folder of `path`) and renames it to `path` when the block
    succeeds.

    Nothing is synced.
    """
    temporary = _temporary_name(Path(path)) if temporary is None else temporary
    try:
        with plain(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def append(path: str | os.PathLike, row: dict) -> None:
    """Appends a JSON line; a crash may truncate the last line, so readers skip a line without a line
    break."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def and_part(path: str | os.PathLike) -> tuple[Path, str | None]:
    """Splits a name such as `best.pth#model` into file and part; the part is None if the whole name exists or
    has no `#`."""
    path = Path(path)
    name, _, part = path.name.rpartition("#")
    return (path.with_name(name), part) if name and part and not path.exists() else (path, None)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds a lock on a file: against processes of this machine and, if supported, of its file server.

    Args:
        shared: allow other shared locks meanwhile.
        wait: wait for the locks of others.

    Raises:
        BlockingIOError: without `wait`, another process holds a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(ImportError):  # no fcntl on Windows
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to disk."""
    if os.name != "nt":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(source: Path, folder: Path) -> None:
    """Renames the folder `source` to `folder`, replacing an existing one."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(source, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: str | os.PathLike) -> str:
    """Text of a file in UTF-8, or in the encoding of its byte order mark (Windows editors write UTF-16).

    Raises:
        OSError: the file cannot be read.
        UnicodeError: the file is not text in that encoding.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")


def describe_error(error: OSError) -> str:
    """Short reason of a read or write error, with the file if the error names one."""
    words = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{words} ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes)) else words


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) atomically."""
    with atomic(path, "w") as file:
        file.write(text)


def require_writable(path: Path, flag: str) -> None:
    """Checks, before the work, that a file can be written.

    Raises:
        UserError: it cannot; names the flag.
    """
    probe = _temporary_name(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        plain(probe).close()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; choose another file") from None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _temporary_name(path: Path) -> Path:
    """Unique name for a temporary file; process ids repeat across machines."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
