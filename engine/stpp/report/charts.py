"""Curves and histograms as SVG coordinates, which the page template draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 240, 84
MOST_POINTS = 300


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over the steps of a stage."""

    title: str
    points: str
    """`x,y` of each point, in units of `WIDTH` and `HEIGHT`."""
    low: float
    high: float
    last: float
    steps: tuple[int, int]
    """First and last step."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Number of images by a value from 0 to 1."""

    title: str
    bars: list[tuple[float, float, float, str]]
    """(x, y, height, label)."""
    bar_width: float
    most: int
    threshold: float | None
    """Value of the vertical line."""
    threshold_x: float | None


def curve(title: str, pairs: Sequence[tuple[int, float]]) -> Curve | None:
    """Curve of (step, value) pairs; None without finite values."""
    pairs = [(step, value) for step, value in pairs if math.isfinite(value)]
    if not pairs:
        return None
    stride = math.ceil(len(pairs) / MOST_POINTS)
    kept = pairs[::stride] + ([pairs[-1]] if (len(pairs) - 1) % stride else [])
    low, high = min(value for _, value in pairs), max(value for _, value in pairs)
    first, last = pairs[0][0], pairs[-1][0]
    points = " ".join(
        f"{WIDTH * (step - first) / max(last - first, 1):.1f},"
        f"{HEIGHT * (high - value) / ((high - low) or 1):.1f}"
        for step, value in kept
    )
    return Curve(title=title, points=points, low=low, high=high, last=pairs[-1][1], steps=(first, last))


def histogram(title: str, counts: Sequence[int], *, threshold: float | None = None) -> Histogram | None:
    """Histogram with equal bars; None if all counts are zero."""
    most = max(counts, default=0)
    if not most:
        return None
    bars = []
    for i, count in enumerate(counts):
        height = HEIGHT * count / most
        label = f"{i / len(counts):.2f} to {(i + 1) / len(counts):.2f}: {count} images"
        bars.append((WIDTH * i / len(counts), HEIGHT - height, height, label))
    return Histogram(title=title, bars=bars, bar_width=WIDTH / len(counts) - 1, most=most,
                     threshold=threshold, threshold_x=None if threshold is None else WIDTH * threshold)
