"""Changes of a corpus since it was listed.

An image is identified by its place: file, and name in it. If its size or modification time differs, it is
read and compared with the hash in its row, so touching a file is no change. Memory grows with the number of
changes, not with the corpus.
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
"""Maximum images of a kind named in a message."""
_BUCKETS = 64
_RECORD = struct.Struct("<16s8sq")

Hashes = Callable[[int], dict[str, int | None] | None]
"""Function from a shard to its images' hashes by key, from its rows; None if the shard is not done."""


class Edit(NamedTuple):
    """Change of one image in a listed shard."""

    shard: int
    dropped: bool
    """True if the image is missing or has changed, so its mask and row are removed; else only its place is
    rewritten."""
    item: Item


@dataclass(kw_only=True)
class Changes:
    """Differences between a corpus and its listing."""

    new: list[str] = field(default_factory=list)
    """Names of new images, as in the source."""
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    touched: int = 0
    """Number of images rewritten with the same content, or before they were labelled."""
    edits: list[Edit] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True if labels are missing or out of date."""
        return bool(self.new or self.changed or self.gone)

    def describe(self) -> str:
        """Describes the changes, for example "2 new (a.jpg, b.jpg), 1 gone (c.jpg)"."""
        kinds = ((self.new, "new"), (self.changed, "changed"), (self.gone, "gone"))
        return ", ".join(f"{len(names)} {kind} ({', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)})"
                         for names, kind in kinds if names)


def compare(source: Source, plan: Plan, hashes: Hashes, add_new: Callable[[Item], None]) -> Changes:
    """Compares a corpus with its listing.

    Args:
        add_new: called with every image to be labelled, in the order of the source.

    Raises:
        UserError: two images would have the same mask.
    """
    new, gone, differing, repeated = _differences(source, plan)
    known, changes, offsets = lru_cache(maxsize=4)(hashes), Changes(), {}
    with Collisions(plan.folder) as keys:
        for item in source.items():
            place = identity(item)
            if place in repeated:
                if place in offsets and offsets[place] == item.offset:
                    continue  # a line of a list
                if place in offsets:
                    raise collision(item.key, item.source, item.source, 1)
                offsets[place] = item.offset
            keys.add(item.key)
            if place in new:
                changes.new.append(item.source)
                add_new(item)
            elif place in differing:
                shard = differing[place]
                dropped = _has_changed(item, known(shard))
                changes.edits.append(Edit(shard, dropped, item))
                if dropped:
                    changes.changed.append(item.source)
                    add_new(item)
                else:
                    changes.touched += 1
        collided = keys.repeated()
    if collided:
        named = ((item.key, item.source) for item in source.items())
        raise collision(*first_pair(collided, named), len(collided))
    for shard in sorted(set(gone.values())):
        missing = [item for item in plan.listed(shard) if identity(item) in gone]
        changes.gone += [item.source for item in missing]
        changes.edits += [Edit(shard, True, item) for item in missing]
    return changes


def _differences(source: Source,
                 plan: Plan) -> tuple[set[bytes], dict[bytes, int], dict[bytes, int], set[bytes]]:
    """Places that are new; gone, by shard; with another mark, by shard; and listed twice by the source."""
    new, gone, differing, repeated = set(), {}, {}, set()
    with _Buckets(plan.folder) as listed, _Buckets(plan.folder) as present:
        for shard in range(plan.shards):
            for item in plan.listed(shard):
                listed.add(item, shard)
        for item in source.items():
            present.add(item, -1)
        for before, after in zip(listed.contents(), present.contents(), strict=True):
            old = {place: (mark, shard) for place, mark, shard in before}
            now: dict[bytes, bytes] = {}
            for place, mark, _ in after:
                if place in now:
                    repeated.add(place)
                now.setdefault(place, mark)
            new |= now.keys() - old.keys()
            gone |= {place: old[place][1] for place in old.keys() - now.keys()}
            differing |= {place: shard for place, (mark, shard) in old.items()
                          if now.get(place, mark) != mark}
    return new, gone, differing, repeated


def _has_changed(item: Item, hashes: dict[str, int | None] | None) -> bool:
    """True if the content of an image differs from what was labelled."""
    if hashes is None:
        return False  # it will be read when its shard is labelled
    if item.error is not None and item.key in hashes:
        return False  # it is not read, because of its name or kind
    try:
        return hashes.get(item.key) is None or hashes[item.key] != content_hash(item.read())
    except OSError:
        return True


def identity(item: Item) -> bytes:
    """Hashes the place of an image to 16 bytes."""
    return hashlib.blake2b(f"{item.file}\0{item.source}".encode(), digest_size=16).digest()


class _Buckets:
    """Places and marks of any number of images in unnamed files; equal places are in the same file."""

    def __init__(self, folder: Path):
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(_BUCKETS)]

    def add(self, item: Item, shard: int) -> None:
        place = identity(item)
        mark = hashlib.blake2b(f"{item.mark} {item.offset} {item.bytes}".encode(), digest_size=8).digest()
        self._files[place[0] % len(self._files)].write(_RECORD.pack(place, mark, shard))

    def contents(self) -> Iterator[Iterator[tuple[bytes, bytes, int]]]:
        """Yields (place, mark, shard) of each image, file after file."""
        for file in self._files:
            file.seek(0)
            yield _RECORD.iter_unpack(file.read())

    def __enter__(self) -> "_Buckets":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
