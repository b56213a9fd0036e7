"""Mask keys from image names: validation as paths below the output, and detection of collisions."""

import hashlib
import re
import tempfile
import urllib.parse
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

_DRIVE = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")
_COMPONENT_BYTES, _KEY_BYTES = 255, 2000
"""Longest file name and longest path below the output, in UTF-8 bytes."""
_BUCKETS, _DIGEST_BYTES = 256, 16


def mask_key(name: str) -> str:
    """Key of an image: its name below the source without the extension; its mask is `<key>.png`.

    Args:
        name: untrusted name with forward slashes, from a folder, a list or an archive.

    Raises:
        ValueError: the name cannot be a path below a folder on every system; the message is the reason,
            without the name.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None
    if _CONTROL.search(name):
        raise ValueError("its name contains a control character")
    if "\\" in name:
        raise ValueError("its name contains a backslash")
    if name.startswith("/") or _DRIVE.match(name):
        raise ValueError("its name is an absolute path")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError("its name leads outside the output ('..')")
    if not parts:
        raise ValueError("it has no name")
    stem, dot, _ = parts[-1].rpartition(".")
    parts[-1] = stem if dot and stem else parts[-1]
    if any(part.lower().endswith(".png") for part in parts[:-1]):
        raise ValueError("a folder in its name ends in .png, as masks do")
    if max(len(part.encode()) for part in [*parts[:-1], parts[-1] + ".png"]) > _COMPONENT_BYTES:
        raise ValueError(f"a part of its name is longer than {_COMPONENT_BYTES} bytes")
    key = "/".join(parts)
    if len(key.encode()) > _KEY_BYTES:
        raise ValueError(f"its name is longer than {_KEY_BYTES} bytes")
    return key


def quoted(name: str) -> str:
    """Any name URL-quoted, as an identifier of images without a key in the table of failures."""
    return urllib.parse.quote(name.encode("utf-8", "surrogateescape"), safe=" ")[:_KEY_BYTES]


def printable(name: str) -> str:
    """Any name as printable text; other characters are escaped."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Collisions:
    """Detects duplicates among any number of keys in constant memory.

    Digests of the keys go to 256 files by their first byte; equal keys are in the same small file.
    """

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        # Unnamed files: removed even if the process is killed.
        self._files = [self._stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(_BUCKETS)]

    def add(self, key: str) -> None:
        """Adds a key."""
        digest = _digest(key)
        self._files[digest[0] % len(self._files)].write(digest)

    def repeated(self) -> set[bytes]:
        """Digests of the keys that were added more than once."""
        found = set()
        for file in self._files:
            file.seek(0)
            digests = np.sort(np.fromfile(file, dtype=f"S{_DIGEST_BYTES}"))
            found.update(_full(digest) for digest in digests[1:][digests[1:] == digests[:-1]].tolist())
        return found

    def __enter__(self) -> "Collisions":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def first_pair(repeated: set[bytes], named: Iterable[tuple[str, str]]) -> tuple[str, str, str]:
    """(key, source, source) of the first two (key, source) pairs with the same repeated key."""
    seen: dict[str, str] = {}
    for key, source in named:
        if _digest(key) in repeated:
            if key in seen:
                return key, seen[key], source
            seen[key] = source
    raise AssertionError("a repeated key is not in the listing")


def is_among(key: str, repeated: set[bytes]) -> bool:
    """True if a key's digest is among those that `Collisions` found repeated."""
    return _digest(key) in repeated


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES).digest()


def _full(digest: bytes) -> bytes:
    """Restores the trailing zero bytes that NumPy drops."""
    return digest.ljust(_DIGEST_BYTES, b"\0")
