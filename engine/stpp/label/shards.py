"""Shards among ranks: a counter in torchrun's store, static parts without one, markers on disk as the truth.

No collective is called while shards are labelled, so a rank that is slow, stopped or dead holds up no other.
A shard is done when its marker exists. The counter only spares ranks from meeting: should two label the same
shard, they write the same bytes, each file whole.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stpp import distributed, files
from stpp.distributed import World
from stpp.errors import UserError
from stpp.label import rows

PATIENCE_S = 60.0
"""A rank that finished no batch for so long, or four times as long as any of ours took, is taken for stopped:
others label its shards."""
POLL_S = 0.2
TELL_S = 1.0
"""How often a rank tells the others of its progress: the store serves many ranks, one request after the
other."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A static share of the shards: those whose number leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `i/n`, i from 1 to n.

        Raises:
            UserError: something else.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--part {text}: must be i/n with i from 1 to n, for example 3/8")
        return cls(index=int(number) - 1, count=int(count))


WHOLE = Part()
"""All of them."""


class Markers:
    """`shards/<number>.done.json`: what makes a shard done."""

    def __init__(self, out: Path):
        self._out, self._folder = out, out / "shards"

    def done(self, shard: int) -> bool:
        """Whether the shard has a marker."""
        return os.path.exists(self._path(shard))

    def write(self, shard: int, content: dict) -> None:
        """Makes the shard done. Everything that the marker speaks of must be on the disk."""
        files.write_json(self._path(shard), content)

    def read(self, shard: int) -> dict:
        """The content of a marker.

        Raises:
            UserError: damaged.
        """
        path = self._path(shard)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it, the shard is labelled "
                            "again") from None

    def remove(self, shard: int) -> None:
        """Makes the shard undone, on the disk too."""
        self._path(shard).unlink(missing_ok=True)
        files.sync_folder(self._folder)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06d}.done.json"


class Ledger:
    """The shards of a run as one rank sees them.

    Args:
        board: of the ranks that share the work; None in a world of one.
        shards: number of shards of the plan.
        done: whether a shard has its marker.
    """

    def __init__(self, here: World, board: "Board | None", *, shards: int, part: Part,
                 done: Callable[[int], bool]):
        self._here, self._store, self._done = here, board, done
        self._mine = range(part.index, shards, part.count)
        self._beat_s, self._longest_s = time.monotonic(), 0.0
        self._told_s, self._totals, self._images, self._bad = 0.0, (0, 0), 0, 0

    def claims(self) -> Iterator[int]:
        """Shards for this rank, one by one, until all were given out; the caller asks which of them are
        done."""
        taken = -1
        while True:
            taken = taken + 1 if self._store is None else self._store.add("next", 1) - 1
            if taken >= len(self._mine):
                return
            if self._store is not None:
                self._store.set(f"owner/{self._mine[taken]}", str(self._here.rank))
            yield self._mine[taken]

    def progress(self, images: int, bad: int) -> tuple[int, int]:
        """Counts images of this rank, also none: a sign of life.

        Returns:
            Images and bad ones of all ranks, as they were a second ago; of one rank, its own.
        """
        self._images, self._bad = self._images + images, self._bad + bad
        now = time.monotonic()
        self._beat_s, self._longest_s = now, max(self._longest_s, now - self._beat_s)
        if self._store is None:
            return self._images, self._bad
        if now - self._told_s >= TELL_S:
            self._tell()
        return self._totals

    def _tell(self) -> None:
        """Adds what was counted since the last time to the counters of all ranks."""
        self._told_s = time.monotonic()
        self._store.add(f"beat/{self._here.rank}", 1)
        self._totals = self._store.add("images", self._images), self._store.add("bad", self._bad)
        self._images = self._bad = 0

    def left_over(self) -> Iterator[int]:
        """Shards that other ranks were given and do not finish; returns when every shard is done."""
        if self._store is not None:
            self._tell()
        missing = [shard for shard in self._mine if not self._done(shard)]
        seen: dict[int, tuple[int, float]] = {}
        tries, patience_s = 0, max(PATIENCE_S, 4 * self._longest_s)
        while missing:
            now = time.monotonic()
            for shard in missing:
                owner = self._owner(shard)
                beat = self._store.number(f"beat/{owner}") if self._store and owner >= 0 else -1
                if shard not in seen or seen[shard][0] != beat:
                    seen[shard] = (beat, now)
            stopped = [shard for shard in missing if self._store is None or now - seen[shard][1] > patience_s]
            for shard in stopped:
                if self._store is None or self._store.add(f"again/{shard}/{tries}", 1) == 1:
                    if self._store is not None:
                        self._store.set(f"owner/{shard}", str(self._here.rank))
                    yield shard
                    break
            else:
                if stopped:  # others took them: they too may stop
                    tries += 1
                    seen = {shard: (value[0], now) for shard, value in seen.items()}
                time.sleep(POLL_S)
            missing = [shard for shard in missing if not self._done(shard)]

    def _owner(self, shard: int) -> int:
        return self._store.number(f"owner/{shard}") if self._store is not None else -1


class Board:
    """Small values that the ranks of one call leave each other in torchrun's store; reading waits for
    nobody."""

    def __init__(self, store: Any, prefix: str):
        self._store, self._prefix = store, prefix

    @classmethod
    def of_this_call(cls, here: World) -> "Board | None":
        """The board of the calling run; None in a world of one. All ranks must be there: it is the one
        collective of a run.

        What a run before it left in the store, perhaps one whose ranks torchrun has started again, has other
        names.
        """
        if not dist.is_initialized() or here.size == 1:
            return None
        token = distributed.gather(secrets.token_hex(8))[0]
        return cls(dist.distributed_c10d._get_default_store(), f"stpp-label/{token}/")

    def add(self, key: str, number: int) -> int:
        """Adds to a counter; returns its value after that."""
        return self._store.add(self._prefix + key, number)

    def set(self, key: str, text: str) -> None:
        """Leaves a value."""
        self._store.set(self._prefix + key, text)

    def get(self, key: str) -> str | None:
        """A value, or None where there is none yet."""
        if not self._store.check([self._prefix + key]):
            return None
        return self._store.get(self._prefix + key).decode()

    def number(self, key: str) -> int:
        """A counter or a value that is a number; -1 where there is none yet."""
        text = self.get(key)
        return -1 if text is None else int(text)

    def wait(self, key: str, limit_s: float | None = None) -> str | None:
        """A value as soon as it is there; None if it is not within the limit."""
        end = None if limit_s is None else time.monotonic() + limit_s
        while (text := self.get(key)) is None:
            if end is not None and time.monotonic() > end:
                return None
            time.sleep(POLL_S)
        return text


def marker_of(table: list[dict], name: str, data: bytes, archives: list[dict]) -> dict:
    """The content of a marker: the files of the shard, and what the summary adds up.

    Args:
        table: the rows of the shard; `name` and `data` are those of their file.
        archives: files that hold more than one mask, as a sink returns them.
    """
    good = [row for row in table if row["status"] == "ok"]
    pixels = [row["class_pixels"] for row in good if row.get("class_pixels") is not None]
    return {"images": len(table), "bad": len(table) - len(good),
            "rows": {"path": name, "bytes": len(data), "crc": rows.checksum(data)}, "files": archives,
            "class_pixels": [sum(counts) for counts in zip(*pixels, strict=True)],
            "pixels": sum(row["width"] * row["height"] for row in good),
            "confidence": sum(row.get("mean_confidence") or row.get("reliability") or 0.0 for row in good)}


def damage(out: Path, table: str, shard: int) -> str | None:
    """The first file of a finished shard that is missing, cut short or altered, in words; or None.

    Args:
        table: folder of the rows, "labels" or "scores".
    """
    try:
        marker = Markers(out).read(shard)
        part = out / table / marker["rows"]["path"]
        found = _differs(part, marker["rows"])
        if found is None and table == "labels":
            masks = marker["files"] or [
                {"path": f"masks/{row['key']}.png", "bytes": row["size"], "crc": row["crc"]}
                for row in rows.read(part) if row["status"] == "ok"]
            found = next((text for file in masks if (text := _differs(out / file["path"], file))), None)
        return found
    except (UserError, KeyError, TypeError) as error:
        return str(error)


def _differs(path: Path, expected: dict) -> str | None:
    try:
        found = measured(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if found["bytes"] != expected["bytes"]:
        return f"{path} has {found['bytes']} bytes instead of {expected['bytes']}"
    return None if found["crc"] == expected["crc"] else f"{path} was altered"


def measured(path: Path) -> dict:
    """`{"bytes", "crc"}` of a file.

    Raises:
        OSError: it cannot be read.
    """
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), rows.checksum(block, crc)
    return {"bytes": size, "crc": crc}
