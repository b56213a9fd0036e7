"""Results of a labelling, read once: totals, failures, and the images that a report lists.

Tables of any length are read a few thousand rows at a time in constant memory.
"""

import heapq
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stpp.errors import UserError
from stpp.label import rows

BINS = 20
"""Bars of a histogram from 0 to 1."""
MOST_LISTED = 100_000
"""Maximum images that a report lists; of more, a random sample and the worst ones."""
MOST_WORST = 2000
"""Worst images listed, by each measure."""
MOST_FAILED = 1000
"""Maximum failures that a report lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A labelled image."""

    key: str
    part: str
    """Name of its table, without the extension; the plan and the masks use the same number."""
    width: int
    height: int
    confidence: float
    """Mean over its pixels, 0 to 1."""
    ignored: float
    """Fraction of ignored pixels, 0 to 1."""
    reliability: float | None
    shares: tuple[tuple[int, float], ...]
    """(class id, fraction of the image's pixels) of the classes that occur."""

    @property
    def random_key(self) -> int:
        """Pseudo-random number of an image, always the same."""
        return zlib.crc32(self.key.encode())


@dataclass(kw_only=True)
class Totals:
    """Counts over all images of a labelling."""

    images: int = 0
    bad: int = 0
    pixels: int = 0
    """Pixels of the good images."""
    class_pixels: list[int] = field(default_factory=list)
    confidences: list[int] = field(default_factory=lambda: [0] * BINS)
    """Good images by mean confidence."""

    def add(self, row: dict) -> None:
        """Counts a row of `labels/part-*.parquet`."""
        self.images += 1
        if row["status"] != "ok":
            self.bad += 1
            return
        self.pixels += row["width"] * row["height"]
        self.class_pixels = added(self.class_pixels, row["class_pixels"])
        self.confidences[bin_of(row["mean_confidence"])] += 1


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """An output of `stpp label`, or a labelling stage of a run."""

    name: str
    folder: Path
    made_by: dict
    """Content of `run.json`."""
    finished: bool
    totals: Totals
    listed: list[Image]
    """Images that the report shows, sorted by key."""
    failed: list[tuple[str, str]]
    """(image, reason) of the first `MOST_FAILED` failures."""


class Lowest:
    """Keeps the values with the lowest scores.

    Args:
        most: number of values kept.
        score: score of a value.
    """

    def __init__(self, most: int, score: Callable[[Image], float]):
        self._most, self._score, self._count = most, score, 0
        self._heap: list[tuple[float, int, Image]] = []

    def offer(self, value: Image) -> None:
        """Adds a value, evicting another if there are too many."""
        self._count += 1
        entry = (-self._score(value), self._count, value)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def values(self) -> Iterable[Image]:
        """Kept values, unsorted."""
        return (value for _, _, value in self._heap)


def read(folder: Path, name: str, reliability: dict[str, float]) -> Labelling:
    """Reads a labelling, finished or not.

    Args:
        reliability: known reliabilities by image key.

    Raises:
        UserError: no labels, or a damaged table.
    """
    parts = rows.parts(folder, "labels")
    if not parts:
        raise UserError(f"{folder}: contains no labels (labels/part-*.parquet); give the --out of `stpp "
                        "label`, or a run")
    totals, failed = Totals(), []
    selections = [Lowest(MOST_LISTED, lambda image: image.random_key),
                  Lowest(MOST_WORST, lambda image: image.confidence),
                  Lowest(MOST_WORST, lambda image: -image.ignored), Lowest(MOST_WORST, rank)]
    for part in parts:
        for row in rows.read(part, rows.LABELS.keys() - {"confidence_map"}):
            totals.add(row)
            if row["status"] != "ok":
                if len(failed) < MOST_FAILED:
                    failed.append((row["source"] or row["key"], row["error"] or "no reason is recorded"))
                continue
            image = _image(row, part.stem, reliability.get(row["key"]))
            for selection in selections:
                selection.offer(image)
    listed = {image.key: image for selection in selections for image in selection.values()}
    return Labelling(name=name, folder=folder, made_by=json_of(folder / "run.json"),
                     finished=(folder / "summary.json").exists(), totals=totals,
                     listed=[listed[key] for key in sorted(listed)], failed=failed)


def rank(image: Image) -> float:
    """Reliability as a sort key; images without one come last."""
    return 2.0 if image.reliability is None else image.reliability


def samples(images: list[Image], most: int) -> list[Image]:
    """Up to `most` images to draw: in turn a random one, the least confident, the most ignored and the least
    reliable."""
    keys: list[Callable[[Image], float]] = [lambda image: image.random_key, lambda image: image.confidence]
    if any(image.ignored for image in images):
        keys.append(lambda image: -image.ignored)
    if any(image.reliability is not None for image in images):
        keys.append(rank)
    orders = [sorted(images, key=key) for key in keys]
    chosen: dict[str, Image] = {}
    for group in zip(*orders, strict=True):
        for image in group:
            if len(chosen) < most:
                chosen.setdefault(image.key, image)
    return list(chosen.values())


def reliabilities(path: Path) -> tuple[dict[str, float], float | None]:
    """Reliability by key from a `reliability.parquet`, and the lowest that counts as reliable; None if there
    is no such limit, because each class has its own (`select_by` class)."""
    table = rows.read(path)
    lowest = min((row["reliability"] for row in table if row["reliable"]), default=None)
    highest = max((row["reliability"] for row in table if not row["reliable"]), default=0.0)
    limit = None if lowest is None or highest > lowest else lowest
    return {row["key"]: row["reliability"] for row in table}, limit


def bin_of(value: float) -> int:
    """Bar of a value from 0 to 1."""
    return max(0, min(int(value * BINS), BINS - 1))


def added(first: list[int], second: list[int]) -> list[int]:
    """Sums by class; an empty list counts as zeros."""
    return [a + b for a, b in zip(first, second, strict=True)] if first and second else list(first or second)


def json_of(path: Path) -> dict:
    """JSON object of a file; empty if missing or unreadable, because a report shows what exists."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _image(row: dict, part: str, reliability: float | None) -> Image:
    pixels = max(row["width"] * row["height"], 1)
    shares = tuple((i, count / pixels) for i, count in enumerate(row["class_pixels"]) if count)
    return Image(key=row["key"], part=part, width=row["width"], height=row["height"],
                 confidence=row["mean_confidence"], ignored=row["ignored_fraction"], reliability=reliability,
                 shares=shares)
