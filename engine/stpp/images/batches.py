"""Planned batches to pixels on the device, prepared ahead of the network.

Bad images are replaced by blanks, so the other images of the batch are computed as usual. Legend: N images, H
W batch size in pixels.
"""

import importlib.util
import threading
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from stpp import log
from stpp.clock import Clock
from stpp.device import CAPTURING, AsyncUpload, copy_stream, on_stream, staging
from stpp.errors import UserError
from stpp.images import storage
from stpp.images.image_file import upright
from stpp.images.items import content_hash
from stpp.images.pixels import BadImage, attempt, normalised
from stpp.images.planning import Planned
from stpp.images.reading import is_dark, require_size

AHEAD = 2
"""Batches prepared while one is computed."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Decoded images of one network batch."""

    planned: list[Planned]
    images_NCHW: torch.Tensor
    """float32, channels_last, normalised, on the device; zero for bad images."""
    errors: dict[int, str]
    """Reasons of bad images, by position in the batch."""
    hashes: list[int | None]
    """`content_hash` of each file's bytes as decoded; None if unreadable."""


class Decoder(Protocol):
    """Decoder of in-memory files; handles one batch at a time."""

    def images(self, planned: list[Planned],
               raw: list[bytes | BadImage]) -> list[np.ndarray | torch.Tensor | BadImage]:
        """Stored pixels of each file, uint8 [H, W, 3], or the reason of failure."""
        ...


class PilDecoder:
    """PIL decoder in a thread pool."""

    def __init__(self, pool: Executor):
        self._pool = pool

    def images(self, planned: list[Planned], raw: list[bytes | BadImage]) -> list[np.ndarray | BadImage]:
        return list(self._pool.map(attempt, raw))


def batches(tasks: Iterator[tuple[int, list[Planned]]], *, device: torch.device, kind: str, threads: int,
            most: int, clock: Clock) -> Iterator[tuple[int, Decoded | None]]:
    """Reads and decodes the given (shard, batch) pairs in order, up to `AHEAD` in advance; yields None for
    empty batches.

    Args:
        kind: "dali" or "pil".
        threads: number of reader threads, and of decoder threads.
        most: images of the largest batch.
    """
    waiting: deque[tuple[int, list[Planned], Future]] = deque()
    warned = threading.Event()
    with (
        ThreadPoolExecutor(threads, "stpp-read") as readers,
        ThreadPoolExecutor(threads, "stpp-decode") as workers,
        ThreadPoolExecutor(1, "stpp-batch") as one_by_one,
    ):
        decoder: Decoder
        if kind == "dali":
            from stpp.images.decode_dali import DaliDecoder

            decoder = DaliDecoder(device, threads, most, workers)
        else:
            decoder = PilDecoder(workers)

        stream = copy_stream(device)

        def prepared(planned: list[Planned],
                     reads: list[Future]) -> tuple[AsyncUpload | None, dict[int, str], list[int | None]]:
            if not planned:
                return None, {}, []
            raw, hashes = zip(*(read.result() for read in reads), strict=True)
            with clock("decode"), CAPTURING, on_stream(stream):
                images = decoder.images(planned, list(raw))
                _warn_of_dark(planned, images, warned)
                pixels_NHWC, errors = _assembled(planned, images, device)
                return AsyncUpload(pixels_NHWC, stream=stream), errors, list(hashes)

        def ready() -> tuple[int, Decoded | None]:
            shard, planned, future = waiting.popleft()
            with clock("wait"):
                arriving, errors, hashes = future.result()
            if not planned:
                return shard, None
            (pixels_NHWC,) = arriving.take()
            images_NCHW = network_input(pixels_NHWC, errors)
            return shard, Decoded(planned=planned, images_NCHW=images_NCHW, errors=errors, hashes=hashes)

        try:
            for shard, planned in tasks:
                reads = [readers.submit(_read, one, clock) for one in planned]
                waiting.append((shard, planned, one_by_one.submit(prepared, planned, reads)))
                if len(waiting) > AHEAD:
                    yield ready()
            while waiting:
                yield ready()
        finally:
            for pool in (one_by_one, readers, workers):
                pool.shutdown(wait=False, cancel_futures=True)


def pick(name: str) -> str:
    """Decoder, "dali" or "pil", for `--loader` "auto", "dali" or "reference".

    Raises:
        UserError: "dali" is requested but not installed.
        ValueError: another name.
    """
    if name not in ("auto", "dali", "reference"):
        raise ValueError(f"name is {name!r}, expected 'auto', 'dali' or 'reference'")
    if name == "reference":
        return "pil"
    if has_dali():
        return "dali"
    if name == "dali":
        raise UserError("--data.loader dali: NVIDIA DALI is not installed; pip install stpp[cuda12] (or "
                        "stpp[cuda13]), or use --data.loader reference")
    return "pil"


def network_input(pixels_NHWC: torch.Tensor, errors: Collection[int]) -> torch.Tensor:
    """Converts uint8 [N, H, W, 3] to normalised float32 [N, 3, H, W], channels_last; blanks become zero."""
    images_NCHW = normalised(pixels_NHWC).permute(0, 3, 1, 2)
    for i in errors:
        images_NCHW[i] = 0
    return images_NCHW


def _read(planned: Planned, clock: Clock) -> tuple[bytes | BadImage, int | None]:
    """Bytes of a file, or the error, and the hash of the bytes."""
    with clock("read"):
        try:
            data = planned.item.read()
        except OSError as error:
            return BadImage(storage.describe_error(error)), None
        digest = content_hash(data)
    if 0 <= planned.item.bytes != len(data):
        return BadImage(f"truncated: {len(data)} of {planned.item.bytes} bytes are present"), digest
    return data, digest


def _warn_of_dark(planned: list[Planned], images: list, warned: threading.Event) -> None:
    """Warns once about a 16-bit image that looks nearly black."""
    for entry, image in zip(planned, images, strict=True):
        if not warned.is_set() and isinstance(image, np.ndarray) and is_dark(image, entry.reading):
            warned.set()
            log.say(f"warning: {entry.item.source}: uses few of its {entry.reading.bits} bits per channel, "
                    "so it looks nearly black to the network, as may others; stretch all of them to the full "
                    "range by the same factor")


def _assembled(planned: list[Planned], images: list,
               device: torch.device) -> tuple[torch.Tensor, dict[int, str]]:
    """Rotates the images upright and stacks them on the device: uint8 [N, H, W, 3], and errors by
    position."""
    shape = (len(planned), *planned[0].size, 3)
    on_device = device.type != "cpu" and any(isinstance(image, torch.Tensor) for image in images)
    if on_device:
        stacked = torch.zeros(shape, dtype=torch.uint8, device=device)
    else:
        stacked = staging(*shape, dtype=torch.uint8, device=device).zero_()
    errors = {}
    for i, (entry, image) in enumerate(zip(planned, images, strict=True)):
        if isinstance(image, BadImage):
            errors[i] = str(image)
            continue
        is_array, image = isinstance(image, np.ndarray), upright(image, entry.reading.orientation)
        try:
            require_size(image.shape[:2], entry.reading)
        except BadImage as bad:
            errors[i] = str(bad)
            continue
        if is_array and not on_device:
            stacked[i].numpy()[...] = image
        else:
            stacked[i].copy_(torch.from_numpy(np.array(image)) if is_array else image)
    return stacked.to(device, non_blocking=True), errors


def has_dali() -> bool:
    """True if DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
