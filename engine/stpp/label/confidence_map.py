"""Confidence map of an image: the confidence at the centres of a coarse grid, small enough for the image's
row."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MOST_CELLS = 48
"""Maximum cells along the longer side: 1,728 bytes for a 4:3 image."""


def sampled(sums_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Samples the confidence of summed probabilities, the largest class's share of the sum, at the grid.

    Args:
        size: (rows, columns) of the images, which the grid covers; the sums may have another size.

    Returns:
        uint8 [N, rows, columns], confidence times 255; 0 if the sum is zero or not finite.
    """
    side = _side(*size)
    ys, xs = (_centres(length, side, sums_NCHW.device) * seen // length
              for length, seen in zip(size, sums_NCHW.shape[-2:], strict=True))
    at_NCrc = sums_NCHW[:, :, ys[:, None], xs]
    return (at_NCrc.amax(1) / at_NCrc.sum(1)).nan_to_num(0, 0, 0).mul(255).round().clamp(0, 255).byte()


def read(data: bytes, height: int, width: int) -> np.ndarray | None:
    """Reads the map, uint8 [rows, columns], of an image of `height` x `width`; None if the number of cells
    differs."""
    side = _side(height, width)
    rows, columns = (-(-length // side) for length in (height, width))
    return np.frombuffer(data, np.uint8).reshape(rows, columns) if len(data) == rows * columns else None


def _side(height: int, width: int) -> int:
    """Side of a square cell, in pixels."""
    return -(-max(height, width) // MOST_CELLS)


@lru_cache(maxsize=256)
def _centres(length: int, side: int, device: torch.device) -> Tensor:
    """Centre pixels of the cells along an axis, int64; the last cell may be cut.

    They are computed on the device and cached, because copying them would wait for it.
    """
    with torch.inference_mode(False):
        return torch.arange(side // 2, length + side // 2, side, device=device).clamp_(max=length - 1)
