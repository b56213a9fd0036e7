"""Images of any size into batches of one size: how each file is read, and which go through a network
together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stpp.images import storage
from stpp.images.containers import PNG_SIGNATURE
from stpp.images.pixels import BadImage
from stpp.images.reading import Reading, look
from stpp.images.sources import Item

HEAD_BYTES = 1 << 14
"""What is read of a file to learn how to read it; where that is too little, all of it is read."""
TAIL_BYTES = 1 << 16
"""What is read of the end of a PNG, which may tell its orientation behind the pixels: an eXIf chunk farther
from the end, behind the pixels of a PNG that `HEAD_BYTES` do not hold, is not seen."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How shards are cut into batches."""

    max_batch: int
    """Images of a batch, at most."""
    batch_pixels: int
    """Pixels of a batch, at most; one image may have more."""
    max_pixels: int
    """An image of more pixels is not labelled."""
    exif: bool
    """Turn images upright by their EXIF orientation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """An image of a shard."""

    item: Item
    position: int
    """Place in the listing of its shard."""
    reading: Reading | None
    """None where it could not be read."""
    batch: int
    """Number of its batch in the shard; -1: it is in none."""
    error: str | None
    """Why it is in none."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the mask."""
        return self.reading.size


def examine(item: Item, cut: Cut) -> Planned:
    """Decides how an image is read; it has no batch yet (0), or never will (-1)."""
    found, error = None, item.error
    if error is None:
        try:
            found = _looked(item, cut)
            if found.width * found.height > cut.max_pixels:
                error = f"{found.width}x{found.height} pixels are more than --max-pixels {cut.max_pixels}"
        except BadImage as bad:
            error = str(bad)
        except OSError as failed:
            error = storage.why(failed)
    return Planned(item=item, position=-1, reading=found, batch=-1 if error else 0, error=error)


def _looked(item: Item, cut: Cut) -> Reading:
    head = item.read(HEAD_BYTES)
    whole = len(head) < HEAD_BYTES
    try:
        tail = item.read_end(TAIL_BYTES) if cut.exif and not whole and head.startswith(PNG_SIGNATURE) else b""
        return look(head, exif=cut.exif, tail=tail)
    except BadImage:
        if whole:
            raise
        return look(item.read(), exif=cut.exif)


def cut_batches(examined: Sequence[Planned], cut: Cut) -> list[Planned]:
    """Numbers the images of a shard and their batches: largest images first, those of one size evenly
    spread."""
    groups: dict[tuple[int, int], list[tuple[int, Planned]]] = {}
    bad = []
    for position, one in enumerate(examined):
        if one.error is None:
            groups.setdefault(one.size, []).append((position, one))
        else:
            bad.append(_numbered(one, position, -1))
    planned, batch = [], 0
    for (height, width), members in sorted(groups.items(),
                                           key=lambda group: (-group[0][0] * group[0][1], group[0])):
        most = min(cut.max_batch, max(1, cut.batch_pixels // (height * width)))
        count = -(-len(members) // most)
        for number in range(count):
            start, stop = (len(members) * i // count for i in (number, number + 1))
            planned += [_numbered(one, position, batch) for position, one in members[start:stop]]
            batch += 1
    return planned + bad


def batches(planned: Sequence[Planned]) -> Iterator[list[Planned]]:
    """The batches of a planned shard, in their order."""
    batch: list[Planned] = []
    for one in planned:
        if batch and one.batch != batch[0].batch:
            yield batch
            batch = []
        if one.batch >= 0:
            batch.append(one)
    if batch:
        yield batch


def _numbered(one: Planned, position: int, batch: int) -> Planned:
    return Planned(item=one.item, position=position, reading=one.reading, batch=batch, error=one.error)
