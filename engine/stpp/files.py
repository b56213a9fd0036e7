"""The one place where files are opened for writing. There are two kinds.

A file that counts as soon as it exists (checkpoint, index, DONE.json, marker) is written whole or not at all:
`atomic`. A file that a marker covers (mask, archive) is written plainly, because the marker comes later and
holds its size and
checksum: `plain`, `renamed`. A reader never takes half a file for a whole.
"""

import codecs
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file that becomes `path` when the block ends without an exception.

    The data and the folder are synced, so after a crash `path` holds either the old or the new content, never
    a part.

    Args:
        path: the final name. Its folder is made if missing.
        mode: "wb" or "w" (UTF-8).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
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
            error.filename = str(path)  # the name that the user gave
        raise
    sync_folder(path.parent)


def create_once(path: Path, data: bytes) -> None:
    """Writes `path` whole, readable by its owner alone, unless another process was faster: its file then
    stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename it replaces nothing
    finally:
        os.unlink(temporary)


def plain(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file that counts only by what is written later: a marker, or a renaming."""
    return open(path, "wb")


@contextlib.contextmanager
def renamed(path: str | os.PathLike, temporary: str | os.PathLike | None = None) -> Iterator[IO[bytes]]:
    """Opens `temporary` (unset: a hidden file beside `path`), which takes its name when the block ends well.

    Nothing is synced.
    """
    temporary = _beside(Path(path)) if temporary is None else temporary
    try:
        with plain(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def append(path: str | os.PathLike, row: dict) -> None:
    """Adds a JSON line; a crash may cut the last line short, so readers pass over a line without an end."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def and_part(path: str | os.PathLike) -> tuple[Path, str | None]:
    """File and part of a name such as `best.pth#model`; no part where a file or folder has the whole name, or
    there is no `#`."""
    path = Path(path)
    name, _, part = path.name.rpartition("#")
    return (path.with_name(name), part) if name and part and not path.exists() else (path, None)


def sha256(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine (or file server, where it has locks) holds the lock
    file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    if os.name != "nt":  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(made: Path, folder: Path) -> None:
    """Gives the folder `made` the name `folder`; one that is there goes away."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says: editors of Windows write one, and
    UTF-16.

    Raises:
        OSError: it cannot be read.
        UnicodeError: it is no such text.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig").replace("\r\n", "\n")


def why(error: OSError) -> str:
    """The reason of a failed reading or writing in a few words, and the file if the error names one."""
    words = error.strerror or " ".join(str(error).split())[:200] or type(error).__name__
    return f"{words} ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes)) else words


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) atomically."""
    with atomic(path, "w") as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _beside(path: Path) -> Path:
    """A name for a temporary file; processes of two machines may have the same number."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
