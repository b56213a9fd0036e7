"""Planning of batches: the reading of each file, and its assignment to batches of equal image size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stpp.images import storage
from stpp.images.containers import PNG_SIGNATURE
from stpp.images.pixels import BadImage
from stpp.images.reading import Reading, read_header
from stpp.images.sources import Item

HEAD_BYTES = 1 << 14
"""Bytes read from a file to determine its reading; if these are too few, the whole file is read."""
TAIL_BYTES = 1 << 16
"""Bytes read from the end of a PNG, whose orientation may follow the pixels. In a PNG longer than
`HEAD_BYTES`, an eXIf chunk after the pixels and farther from the end is not seen."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Limits by which shards are cut into batches."""

    max_batch: int
    """Maximum images per batch."""
    batch_pixels: int
    """Maximum pixels per batch; a larger image is labelled alone."""
    max_pixels: int
    """Largest image that is labelled, in pixels."""
    exif: bool
    """Rotate images upright by their EXIF orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """An image of a shard with its batch."""

    item: Item
    position: int
    """Position in the listing of its shard."""
    reading: Reading | None
    """None if the image is unreadable."""
    batch: int
    """Number of its batch in the shard; -1: none."""
    error: str | None
    """Reason for having no batch."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the mask."""
        return self.reading.size


def examine_alone(item: Item, *, max_pixels: int, exif: bool) -> Planned:
    """Determines the reading of an image, as `examine`, for work outside batches."""
    return examine(item, BatchLimits(max_batch=1, batch_pixels=1, max_pixels=max_pixels, exif=exif))


def examine(item: Item, limits: BatchLimits) -> Planned:
    """Determines the reading of an image; its batch is not assigned yet (0), or will never be (-1)."""
    reading, error = None, item.error
    if error is None:
        try:
            reading = _reading_of(item, limits)
            if reading.width * reading.height > limits.max_pixels:
                error = (f"{reading.width}x{reading.height} pixels are more than --max-pixels "
                         f"{limits.max_pixels}")
        except BadImage as bad:
            error = str(bad)
        except OSError as failed:
            error = storage.describe_error(failed)
    return Planned(item=item, position=-1, reading=reading, batch=-1 if error else 0, error=error)


def _reading_of(item: Item, limits: BatchLimits) -> Reading:
    head = item.read(HEAD_BYTES)
    whole = len(head) < HEAD_BYTES
    try:
        needs_tail = limits.exif and not whole and head.startswith(PNG_SIGNATURE)
        tail = item.read_end(TAIL_BYTES) if needs_tail else b""
        return read_header(head, exif=limits.exif, tail=tail)
    except BadImage:
        if whole:
            raise
        return read_header(item.read(), exif=limits.exif)


def cut_batches(examined: Sequence[Planned], limits: BatchLimits) -> list[Planned]:
    """Assigns positions and batches to the images of a shard: largest images first, images of one size split
    evenly."""
    groups: dict[tuple[int, int], list[tuple[int, Planned]]] = {}
    bad = []
    for position, entry in enumerate(examined):
        if entry.error is None:
            groups.setdefault(entry.size, []).append((position, entry))
        else:
            bad.append(_numbered(entry, position, -1))
    planned, batch = [], 0
    for (height, width), members in sorted(groups.items(),
                                           key=lambda group: (-group[0][0] * group[0][1], group[0])):
        batch_images = min(limits.max_batch, max(1, limits.batch_pixels // (height * width)))
        count = -(-len(members) // batch_images)
        for number in range(count):
            start, stop = (len(members) * i // count for i in (number, number + 1))
            planned += [_numbered(entry, position, batch) for position, entry in members[start:stop]]
            batch += 1
    return planned + bad


def batches(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Yields the batches of a planned shard, in order."""
    batch: list[Planned] = []
    for entry in planned:
        if batch and entry.batch != batch[0].batch:
            yield batch
            batch = []
        if entry.batch >= 0:
            batch.append(entry)
    if batch:
        yield batch


def _numbered(entry: Planned, position: int, batch: int) -> Planned:
    return Planned(item=entry.item, position=position, reading=entry.reading, batch=batch, error=entry.error)
