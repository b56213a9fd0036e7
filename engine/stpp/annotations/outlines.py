"""The outlines of pixels: polygons along the edges of pixels, which cover what they were drawn from to the
pixel.

A region's outer outline runs clockwise, and those of its holes the other way; a hole is joined to the outer
outline by a cut of no width, as formats of polygons know no holes.
"""

import numpy as np


def polygon(mask_HW: np.ndarray) -> np.ndarray:
    """The outline of pixels that hang together by their edges, bool [H, W], as int64 [N, 2]: x, y.

    Holes are joined to it, so that both the rule of crossings and that of windings leave them empty.
    """
    outer, holes = None, []
    for ring in _rings(mask_HW):
        if _clockwise(ring):
            assert outer is None, "the pixels do not hang together"
            outer = ring
        else:
            holes.append(ring)
    # From the right to the left: the cut from a hole's rightmost corner meets the outer outline, or a hole
    # that has been joined.
    for hole in sorted(holes, key=lambda ring: -ring[:, 0].max()):
        outer = _joined(outer, hole)
    return outer


def _rings(mask_HW: np.ndarray) -> list[np.ndarray]:
    """The outlines of pixels, int64 [N, 2] each: corners alone; the pixels lie to the right of the way."""
    padded = np.pad(mask_HW, 1).astype(np.int8)
    starts, ends, forward = _sides(np.diff(padded, axis=0)[:, 1:-1], rows=True)
    up_starts, up_ends, up = _sides(np.diff(padded, axis=1)[1:-1].T, rows=False)
    count, width = len(starts), mask_HW.shape[1] + 1
    starts, ends = np.concatenate((starts, up_starts)), np.concatenate((ends, up_ends))
    # What follows on a side begins at its end. Where pixels meet at a corner alone there are two such: the
    # one to the right keeps them apart.
    forward = np.concatenate((forward, up))
    across = np.arange(len(starts)) < count
    place = (starts[:, 1] * width + starts[:, 0]) * 4 + across * 2 + forward
    order = np.argsort(place)
    # To the right of forward (rightward, downward) ways are downward and leftward ones.
    wanted = (ends[:, 1] * width + ends[:, 0]) * 4 + ~across * 2
    right = wanted + np.where(across, forward, ~forward)
    left = wanted + np.where(across, ~forward, forward)
    found = np.searchsorted(place[order], right).clip(max=len(order) - 1)
    there = place[order][found] == right
    other = np.searchsorted(place[order], left).clip(max=len(order) - 1)
    following = order[np.where(there, found, other)].tolist()
    rings, seen = [], [False] * len(following)
    for first in range(len(following)):
        ring, at = [], first
        while not seen[at]:
            seen[at] = True
            ring.append(at)
            at = following[at]
        if ring:
            rings.append(starts[ring])
    return rings


def _sides(change: np.ndarray, *, rows: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The straight sides along lines: (starts [N, 2], ends [N, 2], whether each runs to the right, or
    downward).

    Args:
        change: int8 [lines, length]: 1 where pixels begin behind the line, -1 where they end.
    """
    edge = np.pad(change, ((0, 0), (1, 1)))
    line, at = np.nonzero(edge[:, 1:] != edge[:, :-1])
    value = edge[line, at + 1]  # of what begins there
    begins = np.flatnonzero(value != 0)
    line, low, high = line[begins], at[begins], at[begins + 1]
    # Pixels lie to the right: below what runs to the right, and left of what runs downward.
    forward = (value[begins] > 0) if rows else (value[begins] < 0)
    first, last = np.where(forward, low, high), np.where(forward, high, low)
    pairs = ((first, line), (last, line)) if rows else ((line, first), (line, last))
    return np.column_stack(pairs[0]), np.column_stack(pairs[1]), forward


def _clockwise(ring: np.ndarray) -> bool:
    x, y = ring.T
    return bool(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)) > 0)


def _joined(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """An outline with a hole in it, by a level cut from the hole's rightmost corner to the next side to its
    right."""
    start = int(hole[:, 0].argmax())
    x, y = hole[start]
    x0, y0 = outer.T
    x1, y1 = np.roll(outer, -1, axis=0).T
    # Upright sides that the cut ends on; of a corner the one side or the other, never neither.
    meets = (x0 == x1) & (x0 >= x) & (np.minimum(y0, y1) <= y) & (y <= np.maximum(y0, y1))
    sides = np.flatnonzero(meets)
    side = int(sides[x0[sides].argmin()])
    bridge = np.array([[x0[side], y]])
    turned = np.concatenate((hole[start:], hole[: start + 1]))
    return np.concatenate((outer[: side + 1], bridge, turned, bridge, outer[side + 1 :]))
