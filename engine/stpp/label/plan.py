"""The plan of a labelling: which images make a shard, and which of them go through the network together.

The listing of a shard is written when the run begins, in the order of the source; its part of the plan
(sizes, batches) by whoever labels it first. Both are kept, so a shard is always computed in the same batches.
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
"""A shard of unknown size holds a 32nd of the corpus, from 16 (fewer, to be equal) to 1000 images."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards of a run."""

    folder: Path
    items: int
    shards: int
    cut: BatchLimits

    def listed(self, shard: int) -> list[Item]:
        """The items of a shard in the order of the source."""
        return [Item(**row) for row in rows.read(listing_path(self.folder, shard))]

    def planned(self, shard: int, pool: Executor) -> list[Planned]:
        """The items of a shard in the order that they are labelled; batches are neighbours. Read, or made and
        kept."""
        path = part_path(self.folder, shard)
        if not path.exists():
            planned = cut_batches(list(pool.map(lambda item: examine(item, self.cut), self.listed(shard))),
                                  self.cut)
            rows.write(path, map(_row, planned), rows.PLAN)
            return planned
        try:
            return [_planned(row) for row in rows.read(path)]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not a part of a plan ({error}); remove it, it is made again") from None


def make(source: Source, folder: Path, *, shard_size: int) -> dict:
    """Lists a corpus into `folder`, a Parquet file a shard.

    Args:
        shard_size: images of a shard; 0: chosen by their number.

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
            chosen = max(1, -(-items // -(-items // chosen))) if items else 1  # of equal size
        flush(0)
        repeated = keys.repeated()
    if repeated:
        dropped = _drop_repeated(folder, shards, repeated)
        items, source.skipped.repeated = items - dropped, dropped
    if not items:
        passed = source.skipped.line()
        raise UserError(f"--source: there is no image in it{f' ({passed})' if passed else ''}")
    return {"items": items, "shards": shards, "shard_size": chosen}


def collision(key: str, one: str, other: str, count: int) -> UserError:
    """The refusal of two images that would have the same mask."""
    if one == other:
        return UserError(f"--source: {one} is there twice ({count} such names); write the archive anew "
                         "without repetitions")
    return UserError(f"--source: {one} and {other} would both be labelled as {key}.png ({count} such names); "
                     "rename one, or label them into two --out (for archives: --tar-folders)")


def _drop_repeated(folder: Path, shards: int, repeated: set[bytes]) -> int:
    """Takes images that are listed a second time out of the listing, as from a list with repeated lines.

    Returns:
        Their number.

    Raises:
        UserError: other images than those have the same key.
    """
    seen: dict[str, dict] = {}
    dropped = 0
    for shard in range(shards):
        listed, kept = rows.read(listing_path(folder, shard)), []
        for row in listed:
            first = seen.setdefault(row["key"], row) if is_among(row["key"], repeated) else row
            if any(first[name] != row[name] for name in ("source", "file", "offset")):
                raise collision(row["key"], first["source"], row["source"], len(repeated))
            if first is row:
                kept.append(row)
        if len(kept) < len(listed):
            dropped += len(listed) - len(kept)
            rows.write(listing_path(folder, shard), kept, rows.LISTING)
    return dropped


def listing_path(folder: Path, shard: int) -> Path:
    """The items of a shard, below `plan/`."""
    return folder / f"listing-{shard:06d}.parquet"


def part_path(folder: Path, shard: int) -> Path:
    """The plan of a shard, below `plan/`."""
    return folder / f"part-{shard:06d}.parquet"


def _row(one: Planned) -> dict:
    found = one.reading._asdict() if one.reading else dict.fromkeys(Reading._fields)
    place = {name: getattr(one.item, name) for name in rows.PLACE}
    return {"position": one.position, **place, **found, "batch": one.batch, "error": one.error}


def _planned(row: dict) -> Planned:
    found = None if row["width"] is None else Reading(*(row[name] for name in Reading._fields))
    item = Item(**{name: row[name] for name in rows.PLACE if name != "error"})
    return Planned(item=item, position=row["position"], reading=found, batch=row["batch"], error=row["error"])
