"""Geometry of a 3x3 convolution of stride 1 whose padding is its dilation: which taps read inside the map.

Derivation: dilated_conv.py.
"""


def valid_share(height: int, width: int, dilation: int) -> float:
    """Computes the share of the nine taps' multiplications that lie inside the map, in [1/9, 1]."""
    rows, columns = height + 2 * max(height - dilation, 0), width + 2 * max(width - dilation, 0)
    return rows * columns / max(9 * height * width, 1)


def valid_range(size: int, tap: int, dilation: int) -> tuple[slice, slice]:
    """Computes, along one axis, the outputs for which `tap` (0, 1, 2) reads inside the map, and the inputs
    that it reads for them."""
    offset = (tap - 1) * dilation
    start, stop = max(0, -offset), min(size, size - offset)
    return slice(start, max(stop, start)), slice(start + offset, max(stop, start) + offset)


def regions(size: int, dilation: int) -> list[tuple[int, int, int, int]]:
    """Splits one axis into ranges of inputs that the same taps read: (start, stop, first tap, last tap)."""
    cuts = sorted({0, min(dilation, size), max(size - dilation, 0), size})
    found = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        taps = [k for k in range(3) if start - (k - 1) * dilation >= 0 and stop - (k - 1) * dilation <= size]
        found.append((start, stop, taps[0], taps[-1]))
    return found
