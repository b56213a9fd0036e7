"""Where in an image a label is sure: the confidence at the centres of a coarse grid, small enough to stand in the image's row."""

import numpy as np
import torch
from torch import Tensor

MOST_CELLS = 48
"""Of the longer side: 1,728 bytes for an image of 4:3."""


def sampled(sums_NCHW: Tensor) -> Tensor:
    """Summed probabilities to their confidence at the grid: the largest class's share of the sum.

    Returns:
        uint8 [N, rows, columns], 0 to 255; 0 where the sum is zero or not finite.
    """
    ys, xs = (torch.tensor(centres, device=sums_NCHW.device) for centres in _centres(*sums_NCHW.shape[-2:]))
    at_NCrc = sums_NCHW[:, :, ys[:, None], xs]
    return (at_NCrc.amax(1) / at_NCrc.sum(1)).nan_to_num(0, 0, 0).mul(255).round().clamp(0, 255).byte()


def read(data: bytes, height: int, width: int) -> np.ndarray | None:
    """The map, uint8 [rows, columns], from the row of an image of `height` x `width`; None if it has another number of cells."""
    ys, xs = _centres(height, width)
    return np.frombuffer(data, np.uint8).reshape(len(ys), len(xs)) if len(data) == len(ys) * len(xs) else None


def _centres(height: int, width: int) -> tuple[list[int], list[int]]:
    """Rows and columns of the pixels in the middle of square cells; those at the far edges may be cut."""
    side = -(-max(height, width) // MOST_CELLS)
    return tuple([min(start + side // 2, length - 1) for start in range(0, length, side)] for length in (height, width))
