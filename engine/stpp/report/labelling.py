"""What a labelling left on the disk, read once: totals, failures, and the images that a report lists.

Tables of any length pass through here a few thousand rows at a time; what is kept does not grow with them.
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
"""Bars of a histogram over 0 to 1."""
MOST_LISTED = 100_000
"""Images that a report lists; of more, a random sample and the worst ones."""
MOST_WORST = 2000
"""The worst ones, by each measure."""
MOST_FAILED = 1000
"""Failures that a report lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A labelled image."""

    key: str
    part: str
    """Name of the table that it stands in, without the extension; the plan and the masks are numbered
    alike."""
    width: int
    height: int
    confidence: float
    """Mean over its pixels, 0 to 1."""
    ignored: float
    """Share of its pixels, 0 to 1."""
    reliability: float | None
    shares: tuple[tuple[int, float], ...]
    """(class id, share of the image's pixels) of the classes that occur."""

    @property
    def lot(self) -> int:
        """A number that is random among images, and always the same for this one."""
        return zlib.crc32(self.key.encode())


@dataclass(kw_only=True)
class Totals:
    """Counts over all images of a labelling."""

    images: int = 0
    bad: int = 0
    pixels: int = 0
    """Of the good images."""
    class_pixels: list[int] = field(default_factory=list)
    confidences: list[int] = field(default_factory=lambda: [0] * BINS)
    """Good images by their mean confidence."""

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
    """Those that the report shows, in the order of their keys."""
    failed: list[tuple[str, str]]
    """(image, reason), the first `MOST_FAILED`."""


class Lowest:
    """Keeps the values with the lowest scores among any number.

    Args:
        most: how many.
        score: of a value.
    """

    def __init__(self, most: int, score: Callable[[Image], float]):
        self._most, self._score, self._count = most, score, 0
        self._heap: list[tuple[float, int, Image]] = []

    def offer(self, value: Image) -> None:
        """Takes a value, and lets go of another where there are too many."""
        self._count += 1
        entry = (-self._score(value), self._count, value)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def values(self) -> Iterable[Image]:
        """What is kept, in no order."""
        return (value for _, _, value in self._heap)


def read(folder: Path, name: str, reliability: dict[str, float]) -> Labelling:
    """Reads a labelling, finished or not.

    Args:
        reliability: of images by key, as far as it is known.

    Raises:
        UserError: nothing is labelled there, or a table is damaged.
    """
    parts = sorted((folder / "labels").glob("part-*.parquet"))
    if not parts:
        raise UserError(f"{folder}: holds no labels (labels/part-*.parquet); give the --out of `stpp label`, "
                        "or a run")
    totals, failed = Totals(), []
    kept = [Lowest(MOST_LISTED, lambda image: image.lot), Lowest(MOST_WORST, lambda image: image.confidence),
            Lowest(MOST_WORST, lambda image: -image.ignored), Lowest(MOST_WORST, rank)]
    for part in parts:
        for row in rows.read(part, rows.LABELS.keys() - {"confidence_map"}):
            totals.add(row)
            if row["status"] != "ok":
                if len(failed) < MOST_FAILED:
                    failed.append((row["source"] or row["key"], row["error"] or "no reason is recorded"))
                continue
            image = _image(row, part.stem, reliability.get(row["key"]))
            for one in kept:
                one.offer(image)
    listed = {image.key: image for one in kept for image in one.values()}
    return Labelling(name=name, folder=folder, made_by=json_of(folder / "run.json"),
                     finished=(folder / "summary.json").exists(), totals=totals,
                     listed=[listed[key] for key in sorted(listed)], failed=failed)


def rank(image: Image) -> float:
    """Reliability; images without one come after all others."""
    return 2.0 if image.reliability is None else image.reliability


def samples(images: list[Image], most: int) -> list[Image]:
    """`most` images to draw: by turns a random one, the least confident, the most ignored and the least
    reliable."""
    keys: list[Callable[[Image], float]] = [lambda image: image.lot, lambda image: image.confidence]
    if any(image.ignored for image in images):
        keys.append(lambda image: -image.ignored)
    if any(image.reliability is not None for image in images):
        keys.append(rank)
    orders = [sorted(images, key=key) for key in keys]
    found: dict[str, Image] = {}
    for group in zip(*orders, strict=True):
        for image in group:
            if len(found) < most:
                found.setdefault(image.key, image)
    return list(found.values())


def reliabilities(path: Path) -> tuple[dict[str, float], float | None]:
    """Reliability by key from a `reliability.parquet`, and the least one that is reliable."""
    table = rows.read(path)
    trusted = [row["reliability"] for row in table if row["reliable"]]
    return {row["key"]: row["reliability"] for row in table}, min(trusted, default=None)


def bin_of(value: float) -> int:
    """The bar of a value from 0 to 1."""
    return max(0, min(int(value * BINS), BINS - 1))


def added(ours: list[int], theirs: list[int]) -> list[int]:
    """Sums by class; an empty list counts as zeros."""
    return [a + b for a, b in zip(ours, theirs, strict=True)] if ours and theirs else list(ours or theirs)


def json_of(path: Path) -> dict:
    """A JSON object from a file; empty where there is none, or nothing that can be read: a report shows what
    there is."""
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
