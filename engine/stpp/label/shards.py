"""Distribution of shards to ranks: a counter in torchrun's store, or static parts; markers on disk decide.

No collective is called while shards are labelled, so a rank that is slow, stopped or dead blocks no other.
A shard is done when its marker exists. The counter only avoids duplicate work: two ranks that label the same
shard write the same bytes, each file whole.
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
"""Timeout after which a rank without a finished batch is taken for stopped, and others label its shards; at
least four times this rank's longest batch."""
POLL_S = 0.2
PUBLISH_S = 1.0
"""Interval at which a rank publishes its progress: the store serves all ranks, one request at a time."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Static share of the shards: numbers that are `index` modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parses `i/n`, i from 1 to n.

        Raises:
            UserError: the text has another form.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise UserError(f"--part {text}: must be i/n with i from 1 to n, for example 3/8")
        return cls(index=int(number) - 1, count=int(count))


WHOLE = Part()
"""Part that contains all shards."""


class Markers:
    """Markers of finished shards, `shards/<number>.done.json`."""

    def __init__(self, out: Path):
        self._out, self._folder = out, out / "shards"

    def done(self, shard: int) -> bool:
        """Checks for the marker of a shard."""
        return os.path.exists(self._path(shard))

    def write(self, shard: int, content: dict) -> None:
        """Marks a shard as done; everything that the marker lists must be on the disk."""
        files.write_json(self._path(shard), content)

    def read(self, shard: int) -> dict:
        """Reads a marker.

        Raises:
            UserError: the marker is damaged.
        """
        path = self._path(shard)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it to have the shard labelled "
                            "again") from None

    def remove(self, shard: int) -> None:
        """Removes the marker of a shard, and syncs the folder."""
        self._path(shard).unlink(missing_ok=True)
        files.sync_folder(self._folder)

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:06d}.done.json"


class Ledger:
    """Claims of shards by one rank, and its progress.

    Args:
        store: shared by the ranks; None in a world of one.
        shards: number of shards of the plan.
        done: checks for the marker of a shard.
        verify: a marker counts only once the rank that claimed the shard has checked its files.
    """

    def __init__(self, world: World, store: "RankStore | None", *, shards: int, part: Part,
                 done: Callable[[int], bool], verify: bool = False):
        self._world, self._store, self._marked, self._verify = world, store, done, verify
        self._mine = range(part.index, shards, part.count)
        self._beat_s, self._longest_s = time.monotonic(), 0.0
        self._published_s, self._totals, self._images, self._bad = 0.0, (0, 0), 0, 0

    def claims(self) -> Iterator[int]:
        """Yields shards claimed by this rank until all are claimed; the caller skips finished ones."""
        taken = -1
        while True:
            taken = taken + 1 if self._store is None else self._store.add("next", 1) - 1
            if taken >= len(self._mine):
                return
            if self._store is not None:
                self._store.set(f"owner/{self._mine[taken]}", str(self._world.rank))
            yield self._mine[taken]

    def checked(self, shard: int) -> None:
        """Records that the files of a shard, whose marker exists, are intact."""
        if self._store is not None:
            self._store.set(f"checked/{shard}", "yes")

    def _done(self, shard: int) -> bool:
        needs_check = self._verify and self._store is not None
        return self._marked(shard) and not (needs_check and self._store.get(f"checked/{shard}") is None)

    def progress(self, images: int, bad: int) -> tuple[int, int]:
        """Counts images of this rank, and renews its heartbeat.

        Returns:
            (images, bad images) of all ranks, up to a second old.
        """
        self._images, self._bad = self._images + images, self._bad + bad
        now = time.monotonic()
        self._beat_s, self._longest_s = now, max(self._longest_s, now - self._beat_s)
        if self._store is None:
            return self._images, self._bad
        if now - self._published_s >= PUBLISH_S:
            self._publish()
        return self._totals

    def _publish(self) -> None:
        """Adds the counts since the last call to the counters of all ranks."""
        self._published_s = time.monotonic()
        self._store.add(f"beat/{self._world.rank}", 1)
        self._totals = self._store.add("images", self._images), self._store.add("bad", self._bad)
        self._images = self._bad = 0

    def left_over(self) -> Iterator[int]:
        """Yields shards that other ranks claimed and do not finish; returns when every shard is done."""
        if self._store is not None:
            self._publish()
        missing = [shard for shard in self._mine if not self._done(shard)]
        beats: dict[int, tuple[int, float]] = {}
        tries, patience_s = 0, max(PATIENCE_S, 4 * self._longest_s)
        while missing:
            now = time.monotonic()
            for shard in missing:
                owner = self._owner(shard)
                beat = self._store.integer(f"beat/{owner}") if self._store and owner >= 0 else -1
                if shard not in beats or beats[shard][0] != beat:
                    beats[shard] = (beat, now)
            stopped = [shard for shard in missing
                       if self._store is None or now - beats[shard][1] > patience_s]
            for shard in stopped:
                if self._store is None or self._store.add(f"again/{shard}/{tries}", 1) == 1:
                    if self._store is not None:
                        self._store.set(f"owner/{shard}", str(self._world.rank))
                    yield shard
                    break
            else:
                if stopped:  # other ranks took them, and may stop too
                    tries += 1
                    beats = {shard: (value[0], now) for shard, value in beats.items()}
                time.sleep(POLL_S)
            missing = [shard for shard in missing if not self._done(shard)]

    def _owner(self, shard: int) -> int:
        return self._store.integer(f"owner/{shard}") if self._store is not None else -1


class RankStore:
    """Values shared by the ranks of one call through torchrun's store; reading does not block."""

    def __init__(self, store: Any, prefix: str):
        self._store, self._prefix = store, prefix

    @classmethod
    def for_call(cls, world: World) -> "RankStore | None":
        """Creates the store of this call; None in a world of one. All ranks must call it: it is the only
        collective of a run.

        A random prefix separates it from values of earlier runs, also of ranks that torchrun restarted.
        """
        if not dist.is_initialized() or world.size == 1:
            return None
        token = distributed.gather(secrets.token_hex(8))[0]
        return cls(dist.distributed_c10d._get_default_store(), f"stpp-label/{token}/")

    def add(self, key: str, number: int) -> int:
        """Adds to a counter, and returns its new value."""
        return self._store.add(self._prefix + key, number)

    def set(self, key: str, text: str) -> None:
        """Sets a value."""
        self._store.set(self._prefix + key, text)

    def get(self, key: str) -> str | None:
        """Returns a value; None if it is not set."""
        if not self._store.check([self._prefix + key]):
            return None
        return self._store.get(self._prefix + key).decode()

    def integer(self, key: str) -> int:
        """Returns a counter or a numeric value; -1 if it is not set."""
        text = self.get(key)
        return -1 if text is None else int(text)

    def wait(self, key: str, limit_s: float | None = None) -> str | None:
        """Waits for a value; None if it is not set within the limit."""
        end = None if limit_s is None else time.monotonic() + limit_s
        while (text := self.get(key)) is None:
            if end is not None and time.monotonic() > end:
                return None
            time.sleep(POLL_S)
        return text


def marker_of(table: list[dict], name: str, data: bytes, archives: list[dict]) -> dict:
    """Makes the content of a marker: the files of the shard, and its counts for the summary.

    Args:
        table: rows of the shard; `name` and `data` are the name and bytes of their file.
        archives: files with more than one mask, as returned by a sink.
    """
    good = [row for row in table if row["status"] == "ok"]
    pixels = [row["class_pixels"] for row in good if row.get("class_pixels") is not None]
    return {"images": len(table), "bad": len(table) - len(good),
            "rows": {"path": name, "bytes": len(data), "crc": rows.checksum(data)}, "files": archives,
            "class_pixels": [sum(counts) for counts in zip(*pixels, strict=True)],
            "pixels": sum(row["width"] * row["height"] for row in good),
            "confidence": sum(row.get("mean_confidence") or row.get("reliability") or 0.0 for row in good)}


def damage(out: Path, table: str, shard: int) -> str | None:
    """Describes the first file of a finished shard that is missing, truncated or altered; None if all are
    intact.

    Args:
        table: folder of the rows, "labels" or "scores".
    """
    try:
        marker = Markers(out).read(shard)
        part = out / table / marker["rows"]["path"]
        damaged = _differs(part, marker["rows"])
        if damaged is None and table == "labels":
            masks = marker["files"] or [
                {"path": f"masks/{row['key']}.png", "bytes": row["size"], "crc": row["crc"]}
                for row in rows.read(part) if row["status"] == "ok"]
            damaged = next((text for file in masks if (text := _differs(out / file["path"], file))), None)
        return damaged
    except (UserError, KeyError, TypeError) as error:
        return str(error)


def _differs(path: Path, expected: dict) -> str | None:
    try:
        actual = size_and_crc(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    if actual["bytes"] != expected["bytes"]:
        return f"{path} has {actual['bytes']} bytes instead of {expected['bytes']}"
    return None if actual["crc"] == expected["crc"] else f"{path} was altered"


def size_and_crc(path: Path) -> dict:
    """Computes `{"bytes", "crc"}` of a file.

    Raises:
        OSError: the file cannot be read.
    """
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), rows.checksum(block, crc)
    return {"bytes": size, "crc": crc}
