"""What changed in a corpus since it was listed.

An image is known by its place: file, and name in it. One whose size or time of change differs is read and
compared with the hash in its row, so that a mere touch is no change. Memory grows with what changed, not with
the corpus.
"""

import hashlib
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from stpp.images.items import Item, content_hash
from stpp.images.names import Collisions, first_pair
from stpp.images.sources import Source
from stpp.label.plan import Plan, collision

NAMED = 3
"""Images of a kind that a message names."""
_BUCKETS = 64
_RECORD = struct.Struct("<16s8sq")

Hashes = Callable[[int], dict[str, int | None] | None]
"""Hashes of the images of a shard by key, from its rows; None where the shard is not done."""


class Edit(NamedTuple):
    """A change of a shard that is listed."""

    shard: int
    dropped: bool
    """The image is gone or has another content: its mask and row go. Else only its place is written anew."""
    item: Item


@dataclass(kw_only=True)
class Changes:
    """Differences between a corpus and its listing."""

    new: list[str] = field(default_factory=list)
    """Names as the source has them."""
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    touched: int = 0
    """Images that were written anew with the same content, or before they were labelled."""
    edits: list[Edit] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True where labels are missing or are not those of the corpus."""
        return bool(self.new or self.changed or self.gone)

    def words(self) -> str:
        """As "2 new (a.jpg, b.jpg), 1 gone (c.jpg)"."""
        kinds = ((self.new, "new"), (self.changed, "changed"), (self.gone, "gone"))
        return ", ".join(f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
                         for names, what in kinds if names)


def compare(source: Source, plan: Plan, hashes: Hashes, fresh: Callable[[Item], None]) -> Changes:
    """Compares a corpus with its listing.

    Args:
        fresh: is given every image that wants a label, in the order of the source.

    Raises:
        UserError: two images would have the same mask.
    """
    new, gone, differing, repeated = _differences(source, plan)
    known, found, seen = lru_cache(maxsize=4)(hashes), Changes(), {}
    with Collisions(plan.folder) as keys:
        for item in source.items():
            one = identity(item)
            if one in repeated:
                if one in seen and seen[one] == item.offset:
                    continue  # a line of a list
                if one in seen:
                    raise collision(item.key, item.source, item.source, 1)
                seen[one] = item.offset
            keys.add(item.key)
            if one in new:
                found.new.append(item.source)
                fresh(item)
            elif one in differing:
                shard = differing[one]
                dropped = _is_another(item, known(shard))
                found.edits.append(Edit(shard, dropped, item))
                if dropped:
                    found.changed.append(item.source)
                    fresh(item)
                else:
                    found.touched += 1
        collided = keys.repeated()
    if collided:
        named = ((item.key, item.source) for item in source.items())
        raise collision(*first_pair(collided, named), len(collided))
    for shard in sorted(set(gone.values())):
        left = [item for item in plan.listed(shard) if identity(item) in gone]
        found.gone += [item.source for item in left]
        found.edits += [Edit(shard, True, item) for item in left]
    return found


def _differences(source: Source,
                 plan: Plan) -> tuple[set[bytes], dict[bytes, int], dict[bytes, int], set[bytes]]:
    """Places that are new; that are gone or have another mark, with their shards; that are met twice."""
    new, gone, differing, repeated = set(), {}, {}, set()
    with _Buckets(plan.folder) as listed, _Buckets(plan.folder) as present:
        for shard in range(plan.shards):
            for item in plan.listed(shard):
                listed.add(item, shard)
        for item in source.items():
            present.add(item, -1)
        for before, after in zip(listed.contents(), present.contents(), strict=True):
            old = {one: (mark, shard) for one, mark, shard in before}
            now: dict[bytes, bytes] = {}
            for one, mark, _ in after:
                if one in now:
                    repeated.add(one)
                now.setdefault(one, mark)
            new |= now.keys() - old.keys()
            gone |= {one: old[one][1] for one in old.keys() - now.keys()}
            differing |= {one: shard for one, (mark, shard) in old.items() if now.get(one, mark) != mark}
    return new, gone, differing, repeated


def _is_another(item: Item, hashes: dict[str, int | None] | None) -> bool:
    """Whether the content of a labelled image is no longer what was labelled."""
    if hashes is None:
        return False  # it will be read when its shard is labelled
    try:
        return hashes.get(item.key) is None or hashes[item.key] != content_hash(item.read())
    except OSError:
        return True


def identity(item: Item) -> bytes:
    """16 bytes for the place of an image."""
    return hashlib.blake2b(f"{item.file}\0{item.source}".encode(), digest_size=16).digest()


class _Buckets:
    """Places and marks of any number of images in files without a name, equal places in the same one."""

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(_BUCKETS)]

    def add(self, item: Item, shard: int) -> None:
        one = identity(item)
        mark = hashlib.blake2b(f"{item.mark} {item.offset} {item.bytes}".encode(), digest_size=8).digest()
        self._files[one[0] % len(self._files)].write(_RECORD.pack(one, mark, shard))

    def contents(self) -> Iterator[Iterator[tuple[bytes, bytes, int]]]:
        """(place, mark, shard) of each image, file after file."""
        for file in self._files:
            file.seek(0)
            yield _RECORD.iter_unpack(file.read())

    def __enter__(self) -> "_Buckets":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
