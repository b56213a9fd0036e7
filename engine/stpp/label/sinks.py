"""Sinks for masks: a PNG file each, or one tar archive per shard.

Nothing is synced here, because files without a marker are ignored. Every file appears whole, by renaming, so
a delayed process can only replace a file by the same bytes.
"""

import io
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from stpp import files
from stpp.clock import Clock
from stpp.images import storage, tars
from stpp.images.masks import write_index_png
from stpp.label.rows import checksum

STALE_S = 24 * 3600
"""Age at which an unmodified temporary file is taken for abandoned."""


class StoredMask(NamedTuple):
    """Encoded mask."""

    size: int
    """Bytes of the PNG."""
    crc: int
    data: bytes | None
    """PNG to be added to an archive; None if it is written."""


class Sink(Protocol):
    """Destination of the masks of one shard."""

    def store(self, key: str, mask_HW: np.ndarray) -> StoredMask:
        """Encodes a mask, and writes it if masks are single files. Called from many threads."""
        ...

    def discard(self, key: str) -> None:
        """Removes the mask of an image that has become bad since the shard was labelled first."""
        ...

    def take(self, key: str, stored: StoredMask) -> None:
        """Adds a stored mask to the archive; called once per mask in a fixed order, from one thread."""
        ...

    def close(self) -> list[dict]:
        """Ends the shard. Returns the files with more than one mask: `{"path", "bytes", "crc"}`."""
        ...

    def abandon(self) -> None:
        """Removes an unfinished archive."""
        ...


def open_sink(kind: str, out: Path, shard: int, clock: Clock) -> Sink:
    """Opens the sink of `--output` "png" or "tar" for one shard."""
    (out / "tmp").mkdir(parents=True, exist_ok=True)
    (out / "masks").mkdir(exist_ok=True)
    return TarSink(out, _archive(shard), clock) if kind == "tar" else PngSink(out, clock)


class PngSink:
    """Sink to files `masks/<key>.png`."""

    def __init__(self, out: Path, clock: Clock):
        self._out, self._folder, self._clock = out, out / "masks", clock
        self._made: set[str] = set()

    def store(self, key: str, mask_HW: np.ndarray) -> StoredMask:
        with self._clock("encode"):
            data = encode(mask_HW)
        with self._clock("write"):
            path = f"{self._folder}/{key}.png"
            parent = os.path.dirname(path)
            if parent not in self._made:
                os.makedirs(parent, exist_ok=True)
                self._made.add(parent)
            with files.renamed(path, _temporary(self._out)) as file:
                file.write(data)
        return StoredMask(len(data), checksum(data), None)

    def discard(self, key: str) -> None:
        with suppress(OSError):
            os.unlink(f"{self._folder}/{key}.png")

    def take(self, key: str, stored: StoredMask) -> None:
        pass

    def close(self) -> list[dict]:
        return []

    def abandon(self) -> None:
        pass


class TarSink:
    """Sink to an archive `masks/shard-<number>.tar` with members `<key>.png`."""

    def __init__(self, out: Path, name: str, clock: Clock):
        self._path, self._clock = out / "masks" / name, clock
        self._temporary = _temporary(out)
        self._file = files.plain(self._temporary)
        self._bytes = self._crc = 0

    def store(self, key: str, mask_HW: np.ndarray) -> StoredMask:
        with self._clock("encode"):
            data = encode(mask_HW)
        return StoredMask(len(data), checksum(data), data)

    def discard(self, key: str) -> None:
        pass

    def take(self, key: str, stored: StoredMask) -> None:
        with self._clock("write"):
            self._append(tars.entry(f"{key}.png", stored.data))

    def close(self) -> list[dict]:
        self._append(tars.END)
        self._file.close()
        os.replace(self._temporary, self._path)
        return [{"path": f"masks/{self._path.name}", "bytes": self._bytes, "crc": self._crc}]

    def abandon(self) -> None:
        with suppress(OSError):  # buffered data may not fit on the disk
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._bytes += len(data)
        self._crc = checksum(data, self._crc)


def repacked(out: Path, shard: int, without: set[str]) -> dict:
    """Rewrites the archive of a finished shard without some masks; the bytes of the others are unchanged.

    Args:
        without: keys of the masks to remove.

    Returns:
        `{"path", "bytes", "crc"}` of the archive.

    Raises:
        UserError: the archive is damaged.
    """
    path = out / "masks" / _archive(shard)
    left_out = {f"{key}.png" for key in without}
    (out / "tmp").mkdir(exist_ok=True)
    sink = TarSink(out, path.name, Clock())
    try:
        for member in tars.members(str(path)):
            if member.name not in left_out:
                data = storage.read(str(path), member.offset, member.bytes)
                sink.take(member.name.removesuffix(".png"), StoredMask(len(data), checksum(data), data))
        return sink.close()[0]
    except BaseException:
        sink.abandon()
        raise


def encode(mask_HW: np.ndarray) -> bytes:
    """Encodes a uint8 [H, W] mask as an 8-bit grayscale PNG."""
    file = io.BytesIO()
    write_index_png(file, mask_HW)
    return file.getvalue()


def sweep(out: Path) -> None:
    """Removes abandoned temporary files of killed processes."""
    for path in (out / "tmp").glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


def _archive(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def _temporary(out: Path) -> Path:
    """Temporary path that is unique across processes and machines, on the masks' file system so that renaming
    is atomic."""
    return out / "tmp" / f"{os.getpid()}.{secrets.token_hex(8)}.tmp"
