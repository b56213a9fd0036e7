"""Rasterising outlines, run lengths and bitmaps; the one module that imports pycocotools.

Polygons are filled as COCO tools do: drawn at five times the size, and filled column by column between their
edges. Legend: x and y in pixels from the upper left corner of the image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from stpp.annotations import runs
from stpp.errors import UserError

SLACK_PX = 2.0
"""Distance that points may lie outside their image: rounding, and tools that draw image frames outside."""
LONGEST_PX = 1 << 22
"""Longest outline that is filled: memory grows with its length."""
_FARTHEST = 1e7
_CROSSED = 0.25
"""Tolerated difference between filled and enclosed pixels per pixel of outline length; below 0.1 for outlines
that do not cross themselves."""


class Patch(NamedTuple):
    """A rectangular part of an image."""

    x: int
    """Left column."""
    y: int
    """Upper row."""
    pixels: np.ndarray
    """bool [h, w]."""


class NoArea(ValueError):
    """A shape without an area: it covers no pixels."""


class Region(Protocol):
    """Pixels covered by one shape."""

    area: float
    """Approximate area in pixels."""

    def patch(self, height: int, width: int) -> Patch:
        """Pixels of the region in an image of this size."""
        ...

    def doubt(self, height: int, width: int) -> str | None:
        """Reason why the region may differ from the intended pixels; None without one.

        Raises:
            NoArea: the region covers no pixels; the message is the reason.
            ValueError: the covered pixels cannot be determined; the message is the reason.
        """
        ...


def pycocotools() -> ModuleType:
    """The `pycocotools.mask` module.

    Raises:
        UserError: pycocotools is not installed.
    """
    try:
        import pycocotools.mask
    except ImportError as error:
        raise UserError(f"filling shapes needs pycocotools ({error}); install it with `pip install "
                        "pycocotools`") from error
    return pycocotools.mask


@dataclass(frozen=True, eq=False)
class Outline:
    """Polygons; the region is their union."""

    rings: tuple[np.ndarray, ...]
    """float64 [N, 2]: x, y."""

    @property
    def area(self) -> float:
        return sum(abs(_enclosed(ring)) for ring in self.rings)

    def patch(self, height: int, width: int) -> Patch:
        x, y, wide, high, rings = self._bounded(height, width)
        if not wide or not high:
            return Patch(0, 0, np.zeros((0, 0), bool))
        coco = pycocotools()
        rings = [points for points, ring in zip(rings, self.rings, strict=True) if _corners(ring) == 3]
        filled = coco.decode(coco.merge(coco.frPyObjects(rings, high, wide)))
        return Patch(x, y, filled.astype(bool))

    def doubt(self, height: int, width: int) -> str | None:
        for ring in self.rings:
            if (length := _length(ring)) > LONGEST_PX:
                raise ValueError(f"its outline is {length:.0f} pixels long")
        corners = [_corners(ring) for ring in self.rings]
        if min(corners) < 3:
            points = f"{min(corners)} distinct {'point' if min(corners) == 1 else 'points'}"
            reason = f"it has {points}; a polygon needs three"
            if max(corners) < 3:
                raise NoArea(reason)
            return reason
        outside = max(_outside(ring, height, width) for ring in self.rings)
        if outside > SLACK_PX:
            return f"it lies {outside:.0f} pixels outside the image of {width}x{height}"
        return self._crossed(height, width)

    def _crossed(self, height: int, width: int) -> str | None:
        """A message if an outline crosses itself: enclosed and filled areas then differ."""
        _, _, wide, high, rings = self._bounded(height, width)
        if not wide or not high:
            return None
        coco = pycocotools()
        filled = coco.area(coco.frPyObjects(rings, high, wide))
        for ring, count in zip(self.rings, filled.tolist(), strict=True):
            off = _CROSSED + _outside(ring, height, width)
            if abs(abs(_enclosed(ring)) - count) > off * _length(ring) + 4:
                return "its outline crosses itself, so the covered area is ambiguous"
        return None

    def _bounded(self, height: int, width: int) -> tuple[int, int, int, int, list[list[float]]]:
        """(x, y, width, height) of the bounding box inside the image, and the rings relative to it."""
        points = np.concatenate(self.rings)
        low = np.maximum(np.floor(points.min(0)).astype(np.int64) - 1, 0)
        high = np.minimum(np.ceil(points.max(0)).astype(np.int64) + 2, (width, height))
        wide, tall = np.maximum(high - low, 0).tolist()
        return *low.tolist(), wide, tall, [(ring - low).ravel().tolist() for ring in self.rings]


@dataclass(frozen=True, eq=False)
class Runs:
    """Column-major run lengths of a whole image."""

    counts: np.ndarray
    """int64 [N]; the first run is off."""
    size: tuple[int, int]
    """(height, width)."""

    @property
    def area(self) -> float:
        return float(self.counts[1::2].sum())

    def patch(self, height: int, width: int) -> Patch:
        return Patch(0, 0, runs.pixels(self.counts, height, width))

    def doubt(self, height: int, width: int) -> str | None:
        if self.size != (height, width):
            raise ValueError(f"its mask has {self.size[1]}x{self.size[0]} pixels, but the image has "
                             f"{width}x{height}")
        runs.checked(self.counts, height, width)
        return None


@dataclass(frozen=True, eq=False)
class Bitmap:
    """Mask pixels at an offset."""

    x: int
    y: int
    size: tuple[int, int]
    """(height, width)."""
    read: Callable[[], np.ndarray]
    """Decodes the pixels, bool [h, w]."""

    @property
    def area(self) -> float:
        return float(np.count_nonzero(self.read()))

    def patch(self, height: int, width: int) -> Patch:
        left, top = max(-self.x, 0), max(-self.y, 0)
        inside = self.read()[top : max(height - self.y, 0), left : max(width - self.x, 0)]
        return Patch(max(self.x, 0), max(self.y, 0), inside)

    def doubt(self, height: int, width: int) -> str | None:
        tall, wide = self.size
        outside = max(-self.x, -self.y, self.x + wide - width, self.y + tall - height)
        if outside <= SLACK_PX:
            return None
        return f"it lies {outside} pixels outside the image of {width}x{height}"


def ring(values: object) -> np.ndarray:
    """An outline, float64 [N, 2], from numbers x, y, x, y, ... or pairs.

    Raises:
        ValueError: not an outline; the message is the reason.
    """
    try:
        points = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        points = np.zeros((1, 3))
    if points.ndim == 1 and points.size % 2 == 0:
        points = points.reshape(-1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not points.size:
        raise ValueError("its polygon is not a list of alternating x and y")
    if not (np.abs(points) < _FARTHEST).all():
        raise ValueError("its polygon has an invalid or out-of-range coordinate")
    return points


def _corners(ring: np.ndarray) -> int:
    """Number of distinct points of an outline, at most 3."""
    seen: set[tuple[float, ...]] = set()
    for point in ring.tolist():
        seen.add(tuple(point))
        if len(seen) == 3:
            break
    return len(seen)


def _outside(ring: np.ndarray, height: int, width: int) -> float:
    """Largest distance in pixels by which an outline leaves its image."""
    return max(0.0, float(-ring.min()), float((ring - (width, height)).max()))


def _enclosed(ring: np.ndarray) -> float:
    """Signed area that an outline [N, 2] encloses, negative if counterclockwise."""
    x, y = (ring - ring[0]).T  # relative to the first corner, whose terms vanish
    return 0.5 * float(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]))


def _length(ring: np.ndarray) -> float:
    return float(np.hypot(*(ring[1:] - ring[:-1]).T).sum() + np.hypot(*(ring[0] - ring[-1])))
