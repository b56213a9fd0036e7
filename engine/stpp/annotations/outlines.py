"""Outlines of masks: polygons along pixel edges that cover exactly the pixels they were traced from.

Outer outlines run clockwise, holes counterclockwise; polygon formats have no holes, so each hole is joined to
the outer outline by a cut of zero width.
"""

import numpy as np


def polygon(mask_HW: np.ndarray) -> np.ndarray:
    """Outline of an edge-connected component, bool [H, W], as int64 [N, 2]: x, y.

    Holes are joined so that both the even-odd and the nonzero winding rule leave them empty.
    """
    outer, holes = None, []
    for ring in _rings(mask_HW):
        if _clockwise(ring):
            assert outer is None, "the pixels are not connected"
            outer = ring
        else:
            holes.append(ring)
    # From right to left: the cut from a hole's rightmost corner then meets the outer outline or a joined
    # hole.
    for hole in sorted(holes, key=lambda ring: -ring[:, 0].max()):
        outer = _joined(outer, hole)
    return outer


def _rings(mask_HW: np.ndarray) -> list[np.ndarray]:
    """Closed outlines, int64 [N, 2] each: corners only, pixels on the right of the direction of travel."""
    padded = np.pad(mask_HW, 1).astype(np.int8)
    starts, ends, forward = _sides(np.diff(padded, axis=0)[:, 1:-1], rows=True)
    up_starts, up_ends, up = _sides(np.diff(padded, axis=1)[1:-1].T, rows=False)
    count, width = len(starts), mask_HW.shape[1] + 1
    starts, ends = np.concatenate((starts, up_starts)), np.concatenate((ends, up_ends))
    # The successor of a side begins at its end. Where pixels touch only at a corner there are two
    # candidates: turning right keeps the pixels apart.
    forward = np.concatenate((forward, up))
    across = np.arange(len(starts)) < count
    place = (starts[:, 1] * width + starts[:, 0]) * 4 + across * 2 + forward
    order = np.argsort(place)
    # A right turn leads from rightward to downward, and from downward to leftward.
    wanted = (ends[:, 1] * width + ends[:, 0]) * 4 + ~across * 2
    right = wanted + np.where(across, forward, ~forward)
    left = wanted + np.where(across, ~forward, forward)
    nearest = np.searchsorted(place[order], right).clip(max=len(order) - 1)
    turns_right = place[order][nearest] == right
    left_nearest = np.searchsorted(place[order], left).clip(max=len(order) - 1)
    following = order[np.where(turns_right, nearest, left_nearest)].tolist()
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
    """Straight sides along lines: (starts [N, 2], ends [N, 2], True where a side runs rightward or downward).

    Args:
        change: int8 [lines, length]: 1 where pixels begin after the line, -1 where they end.
    """
    edge = np.pad(change, ((0, 0), (1, 1)))
    line, at = np.nonzero(edge[:, 1:] != edge[:, :-1])
    value = edge[line, at + 1]  # of the run that begins there
    begins = np.flatnonzero(value != 0)
    line, low, high = line[begins], at[begins], at[begins + 1]
    # Pixels lie on the right: below rightward sides, left of downward ones.
    forward = (value[begins] > 0) if rows else (value[begins] < 0)
    first, last = np.where(forward, low, high), np.where(forward, high, low)
    pairs = ((first, line), (last, line)) if rows else ((line, first), (line, last))
    return np.column_stack(pairs[0]), np.column_stack(pairs[1]), forward


def _clockwise(ring: np.ndarray) -> bool:
    x, y = ring.T
    return bool(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)) > 0)


def _joined(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Joins a hole to an outline by a horizontal cut from the hole's rightmost corner to the next side on its
    right."""
    start = int(hole[:, 0].argmax())
    x, y = hole[start]
    x0, y0 = outer.T
    x1, y1 = np.roll(outer, -1, axis=0).T
    # Vertical sides that the cut can end on; at a corner, at least one of the two sides counts.
    meets = (x0 == x1) & (x0 >= x) & (np.minimum(y0, y1) <= y) & (y <= np.maximum(y0, y1))
    sides = np.flatnonzero(meets)
    side = int(sides[x0[sides].argmin()])
    bridge = np.array([[x0[side], y]])
    turned = np.concatenate((hole[start:], hole[: start + 1]))
    return np.concatenate((outer[: side + 1], bridge, turned, bridge, outer[side + 1 :]))
