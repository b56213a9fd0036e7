"""Plan of a labelling: the images of each shard, and their batches.

The listing of a shard is written when the run begins, in the order of the source; its part of the plan
(sizes, batches) by the first process that labels it. Both are kept, so a shard always has the same batches.
"""

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from stpp.errors import UserError
from stpp.images.names import Collisions, is_among
from stpp.images.planning import BatchLimits, Planned, cut_batches, examine
from stpp.images.reading import Reading
from stpp.images.sources import Item, Source
from stpp.label import rows

SMALLEST_SHARD, LARGEST_SHARD, SHARDS_OF_FEW = 16, 1000, 32
"""Default shard size: a 32nd of the corpus, from 16 (fewer for equal shards) to 1000 images."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Shards of a run."""

    folder: Path
    items: int
    shards: int
    cut: BatchLimits

    def listed(self, shard: int) -> list[Item]:
        """Reads the items of a shard, in the order of the source."""
        return [Item(**row) for row in rows.read(listing_path(self.folder, shard))]

    def planned(self, shard: int, pool: Executor) -> list[Planned]:
        """Reads, or makes and writes, the plan of a shard: items in labelling order, batch after batch."""
        path = part_path(self.folder, shard)
        if not path.exists():
            planned = cut_batches(list(pool.map(lambda item: examine(item, self.cut), self.listed(shard))),
                                  self.cut)
            rows.write(path, map(_row, planned), rows.PLAN)
            return planned
        try:
            return [_planned(row) for row in rows.read(path)]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not a part of a plan ({error}); remove it to have it made "
                            "again") from None


def make(source: Source, folder: Path, *, shard_size: int) -> dict:
    """Lists a corpus into `folder`, one Parquet file per shard.

    Args:
        shard_size: images per shard; 0: chosen by the size of the corpus.

    Returns:
        `{"items", "shards", "shard_size"}`.

    Raises:
        UserError: the corpus is empty, or two images would have the same mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    items, shards, waiting = 0, 0, []
    chosen = shard_size or LARGEST_SHARD
    enough = chosen if shard_size else LARGEST_SHARD * SHARDS_OF_FEW
    with Collisions(folder) as keys:
        def flush(leave: int) -> None:
            nonlocal shards, waiting
            while len(waiting) > leave:
                listed, waiting = waiting[:chosen], waiting[chosen:]
                rows.write(listing_path(folder, shards), map(rows.listing_row, listed), rows.LISTING)
                shards += 1

        for item in source.items():
            items += 1
            keys.add(item.key)
            waiting.append(item)
            if len(waiting) == enough:
                flush(enough - chosen)
        if not shard_size and not shards:
            chosen = min(max(-(-items // SHARDS_OF_FEW), SMALLEST_SHARD), LARGEST_SHARD)
            chosen = max(1, -(-items // -(-items // chosen))) if items else 1  # shards of equal size
        flush(0)
        repeated = keys.repeated()
    if repeated:
        dropped = _drop_repeated(folder, shards, repeated)
        items, source.skipped.repeated = items - dropped, dropped
    if not items:
        passed = source.skipped.line()
        raise UserError(f"--source: contains no image{f' ({passed})' if passed else ''}")
    return {"items": items, "shards": shards, "shard_size": chosen}


def collision(key: str, first: str, second: str, count: int) -> UserError:
    """Makes the error about two images that would have the same mask."""
    if first == second:
        return UserError(f"--source: contains {first} twice ({count} repeated names): an archive with "
                         "repetitions, or two archives of one name; write it anew, or rename one")
    return UserError(f"--source: {first} and {second} would both be labelled as {key}.png ({count} such "
                     "names); rename one, or label them into two --out (for archives: --tar-folders)")


def _drop_repeated(folder: Path, shards: int, repeated: set[bytes]) -> int:
    """Removes repeated images from the listing, for example of a list with repeated lines.

    Returns:
        Number of images removed.

    Raises:
        UserError: two different images have the same key.
    """
    first_rows: dict[str, dict] = {}
    dropped = 0
    for shard in range(shards):
        listed, kept = rows.read(listing_path(folder, shard)), []
        for row in listed:
            first = first_rows.setdefault(row["key"], row) if is_among(row["key"], repeated) else row
            if any(first[name] != row[name] for name in ("source", "file", "offset")):
                raise collision(row["key"], first["source"], row["source"], len(repeated))
            if first is row:
                kept.append(row)
        if len(kept) < len(listed):
            dropped += len(listed) - len(kept)
            rows.write(listing_path(folder, shard), kept, rows.LISTING)
    return dropped


def listing_path(folder: Path, shard: int) -> Path:
    """Path of a shard's listing, below `plan/`."""
    return folder / f"listing-{shard:06d}.parquet"


def part_path(folder: Path, shard: int) -> Path:
    """Path of a shard's plan, below `plan/`."""
    return folder / f"part-{shard:06d}.parquet"


def _row(image: Planned) -> dict:
    reading = image.reading._asdict() if image.reading else dict.fromkeys(Reading._fields)
    place = {name: getattr(image.item, name) for name in rows.PLACE}
    return {"position": image.position, **place, **reading, "batch": image.batch, "error": image.error}


def _planned(row: dict) -> Planned:
    reading = None if row["width"] is None else Reading(*(row[name] for name in Reading._fields))
    return Planned(item=rows.item(row), position=row["position"], reading=reading, batch=row["batch"],
                   error=row["error"])
