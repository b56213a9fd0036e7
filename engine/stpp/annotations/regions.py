"""Outlines, run lengths and bitmaps as pixels of an image: the one module that imports pycocotools.

Its fill is the one that people of this field expect: the outline is drawn five times as large and its columns
are filled between its edges. Legend: x and y count pixels from the upper left corner of the image.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

from stpp.annotations import runs
from stpp.errors import UserError

SLACK_PX = 2.0
"""How far points may lie outside their image: rounding, and tools that draw its frame outside of it."""
LONGEST_PX = 1 << 22
"""Longest outline that is filled: memory for it grows with its length."""
_FARTHEST = 1e7
_CROSSED = 0.25
"""Pixels by which what is filled and what an outline encloses may differ, per pixel of its length; of
outlines that do not cross themselves it is below a tenth."""


class Patch(NamedTuple):
    """A part of an image."""

    x: int
    """Left column."""
    y: int
    """Upper row."""
    pixels: np.ndarray
    """bool [h, w]."""


class Region(Protocol):
    """What one shape covers."""

    area: float
    """In pixels, about."""

    def patch(self, height: int, width: int) -> Patch:
        """Its pixels in an image of this size."""
        ...

    def doubt(self, height: int, width: int) -> str | None:
        """Why it may cover other pixels than was meant; None where nothing speaks for that.

        Raises:
            ValueError: it covers no pixels that can be told, with the reason.
        """
        ...


def pycocotools() -> ModuleType:
    """The package's functions on masks.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pycocotools.mask
    except ImportError as error:
        raise UserError(f"shapes are filled by pycocotools ({error}); install it with `pip install "
                        "pycocotools`") from error
    return pycocotools.mask


@dataclass(frozen=True, eq=False)
class Outline:
    """Polygons; what any of them covers belongs to it."""

    rings: tuple[np.ndarray, ...]
    """float64 [N, 2]: x, y."""

    @property
    def area(self) -> float:
        return sum(abs(_enclosed(ring)) for ring in self.rings)

    def patch(self, height: int, width: int) -> Patch:
        x, y, wide, high, rings = self._cut(height, width)
        if not wide or not high:
            return Patch(0, 0, np.zeros((0, 0), bool))
        coco = pycocotools()
        filled = coco.decode(coco.merge(coco.frPyObjects(rings, high, wide)))
        return Patch(x, y, filled.astype(bool))

    def doubt(self, height: int, width: int) -> str | None:
        for ring in self.rings:
            if (count := _corners(ring)) < 3:
                raise ValueError(f"it has {count} different {'point' if count == 1 else 'points'}, and a "
                                 "polygon needs three")
            if (length := _length(ring)) > LONGEST_PX:
                raise ValueError(f"its outline is {length:.0f} pixels long")
        outside = max(_outside(ring, height, width) for ring in self.rings)
        if outside > SLACK_PX:
            return f"it lies {outside:.0f} pixels outside the image of {width}x{height}"
        return self._crossed(height, width)

    def _crossed(self, height: int, width: int) -> str | None:
        """Whether an outline crosses itself: then what it encloses and what is filled differ."""
        _, _, wide, high, rings = self._cut(height, width)
        if not wide or not high:
            return None
        coco = pycocotools()
        filled = coco.area(coco.frPyObjects(rings, high, wide))
        for ring, count in zip(self.rings, filled.tolist(), strict=True):
            off = _CROSSED + _outside(ring, height, width)
            if abs(abs(_enclosed(ring)) - count) > off * _length(ring) + 4:
                return "its outline crosses itself, so what it covers is not plain"
        return None

    def _cut(self, height: int, width: int) -> tuple[int, int, int, int, list[list[float]]]:
        """(x, y, width, height) of the part of the image that it may cover, and its points from there."""
        points = np.concatenate(self.rings)
        low = np.maximum(np.floor(points.min(0)).astype(np.int64) - 1, 0)
        high = np.minimum(np.ceil(points.max(0)).astype(np.int64) + 2, (width, height))
        wide, tall = np.maximum(high - low, 0).tolist()
        return *low.tolist(), wide, tall, [(ring - low).ravel().tolist() for ring in self.rings]


@dataclass(frozen=True, eq=False)
class Runs:
    """Run lengths of a whole image, column by column."""

    counts: np.ndarray
    """int64 [N], off first."""
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
    """A picture of the pixels."""

    x: int
    y: int
    pixels: np.ndarray
    """bool [h, w]."""

    @property
    def area(self) -> float:
        return float(np.count_nonzero(self.pixels))

    def patch(self, height: int, width: int) -> Patch:
        left, top = max(-self.x, 0), max(-self.y, 0)
        inside = self.pixels[top : max(height - self.y, 0), left : max(width - self.x, 0)]
        return Patch(max(self.x, 0), max(self.y, 0), inside)

    def doubt(self, height: int, width: int) -> str | None:
        tall, wide = self.pixels.shape
        outside = max(-self.x, -self.y, self.x + wide - width, self.y + tall - height)
        if outside <= SLACK_PX:
            return None
        return f"it lies {outside} pixels outside the image of {width}x{height}"


def ring(values: object) -> np.ndarray:
    """An outline, float64 [N, 2], from numbers x, y, x, y, ... or pairs of them.

    Raises:
        ValueError: it is none, with the reason.
    """
    try:
        found = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        found = np.zeros((1, 3))
    if found.ndim == 1 and found.size % 2 == 0:
        found = found.reshape(-1, 2)
    if found.ndim != 2 or found.shape[1] != 2 or not found.size:
        raise ValueError("its polygon is no list of x and y in turn")
    if not (np.abs(found) < _FARTHEST).all():
        raise ValueError("its polygon has a coordinate that is no number, or that no image has")
    return found


def _corners(ring: np.ndarray) -> int:
    """Different points of an outline, 3 where it has more."""
    seen: set[tuple[float, ...]] = set()
    for point in ring.tolist():
        seen.add(tuple(point))
        if len(seen) == 3:
            break
    return len(seen)


def _outside(ring: np.ndarray, height: int, width: int) -> float:
    """Pixels by which an outline leaves its image."""
    return max(0.0, float(-ring.min()), float((ring - (width, height)).max()))


def _enclosed(ring: np.ndarray) -> float:
    """Area that an outline [N, 2] goes around, negative against the clock."""
    x, y = (ring - ring[0]).T  # from its first corner, which then adds nothing
    return 0.5 * float(np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]))


def _length(ring: np.ndarray) -> float:
    return float(np.hypot(*(ring[1:] - ring[:-1]).T).sum() + np.hypot(*(ring[0] - ring[-1])))
