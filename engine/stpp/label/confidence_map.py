"""Where in an image a label is sure: the confidence at the centres of a coarse grid, small enough to stand in
the image's row."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MOST_CELLS = 48
"""Of the longer side: 1,728 bytes for an image of 4:3."""


def sampled(sums_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Summed probabilities to their confidence at the grid: the largest class's share of the sum.

    Args:
        size: (rows, columns) of the images, which the grid lies over; the sums may have another.

    Returns:
        uint8 [N, rows, columns], 0 to 255; 0 where the sum is zero or not finite.
    """
    side = _side(*size)
    ys, xs = (_centres(length, side, sums_NCHW.device) * seen // length
              for length, seen in zip(size, sums_NCHW.shape[-2:], strict=True))
    at_NCrc = sums_NCHW[:, :, ys[:, None], xs]
    return (at_NCrc.amax(1) / at_NCrc.sum(1)).nan_to_num(0, 0, 0).mul(255).round().clamp(0, 255).byte()


def read(data: bytes, height: int, width: int) -> np.ndarray | None:
    """The map, uint8 [rows, columns], from the row of an image of `height` x `width`; None if it has another
    number of cells."""
    side = _side(height, width)
    rows, columns = (-(-length // side) for length in (height, width))
    return np.frombuffer(data, np.uint8).reshape(rows, columns) if len(data) == rows * columns else None


def _side(height: int, width: int) -> int:
    """Of a square cell, pixels."""
    return -(-max(height, width) // MOST_CELLS)


@lru_cache(maxsize=256)
def _centres(length: int, side: int, device: torch.device) -> Tensor:
    """Pixels in the middle of the cells along an axis, int64; the cell at the far edge may be cut.

    They are computed where they are used, because copying them there would wait for the device, and kept.
    """
    with torch.inference_mode(False):
        return torch.arange(side // 2, length + side // 2, side, device=device).clamp_(max=length - 1)
