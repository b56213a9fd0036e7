"""Test-time augmentation: the views of an image, whole or in crops, and the sum of their class probabilities.

N images, C classes, H W size of the image; a view has the size (int(H * scale), int(W * scale)).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from stpp.config import WindowEdges
from stpp_kernels import finalize, softmax_accumulate, upsample_argmax

VIEWS: dict[str, tuple[tuple[float, ...], bool]] = {
    "stpp": ((0.5, 0.75, 1.0, 1.5, 2.0), True),
    "flip": ((1.0,), True),
    "none": ((1.0,), False),
}
"""Scales of each mode, and whether every scale is also seen mirrored."""


def accumulate(logits: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor, mode: str,
               num_classes: int) -> torch.Tensor:
    """Sums the class probabilities of all views at the size of the image.

    A view and its mirror image go through the network as one batch of 2N.

    Args:
        logits: images -> low-resolution logits.
        images_NCHW: float32, normalised.
        mode: key of `VIEWS`.

    Returns:
        float32 [N, C, H, W]: the sum over views; divide by their number for probabilities.

    Source: ST++ (arXiv 2106.05095), pseudo labelling.
    """
    scales, mirrored = VIEWS[mode]
    count, _, height, width = images_NCHW.shape
    sums_NCHW = images_NCHW.new_zeros(count, num_classes, height, width)
    for scale in scales:
        size = (max(1, int(height * scale)), max(1, int(width * scale)))
        view = images_NCHW if size == (height, width) else F.interpolate(
            images_NCHW, size, mode="bilinear", align_corners=True)
        if mirrored:
            view = torch.cat([view, view.flip(3)])
        low = logits(view.contiguous(memory_format=torch.channels_last))
        softmax_accumulate(sums_NCHW, low, size, (height, width), pair=mirrored)
    return sums_NCHW


def accumulate_crops(logits: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor, mode: str,
                     num_classes: int, crop_px: int, edges: WindowEdges = "cut") -> torch.Tensor:
    """As `accumulate`, but the network sees overlapping crops, and each has its views.

    A crop begins at every two thirds of its side; see `starts` for the last ones. An image smaller than a
    crop is one crop.

    Args:
        crop_px: side of the square crops, pixels.
        edges: what becomes of the last crops of a row or column.

    Returns:
        float32 [N, C, H, W]: the sum over crops and views. How many hold a pixel differs, but a pixel's
        classes share that
        number: the largest sum is the largest mean.

    Source: sliding-window evaluation of Cityscapes in the public code of UniMatch (arXiv 2208.09910) and of
    UniMatch-V2 (arXiv 2410.10777).
    """
    count, _, height, width = images_NCHW.shape
    sums_NCHW = images_NCHW.new_zeros(count, num_classes, height, width)
    for top in starts(height, crop_px, edges):
        for left in starts(width, crop_px, edges):
            crop = (..., slice(top, top + crop_px), slice(left, left + crop_px))
            sums_NCHW[crop] += accumulate(logits, images_NCHW[crop], mode, num_classes)
    return sums_NCHW


def starts(length: int, crop_px: int, edges: WindowEdges) -> list[int]:
    """First rows, or columns, of the crops of a side of `length` pixels.

    One at every two thirds of a crop: "cut": as long as the image goes on, so the last ones may be small, and
    lie within others; "shifted": the last one ends with the image and has the size of the others.
    """
    step = max(1, 2 * crop_px // 3)
    if edges == "cut":
        return list(range(0, length, step))
    last = max(0, length - crop_px)
    return [*range(0, last, step), last]


def masks(logits: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor, mode: str,
          num_classes: int, *, crop_px: int | None = None, edges: WindowEdges = "cut") -> torch.Tensor:
    """The most likely class of every pixel over all views: uint8 [N, H, W].

    Where there is one view no probabilities are computed. Arguments as of `accumulate` and, with `crop_px`,
    `accumulate_crops`.
    """
    if crop_px is not None:
        return finalize(accumulate_crops(logits, images_NCHW, mode, num_classes, crop_px, edges))[0]
    if mode == "none":
        return upsample_argmax(logits(images_NCHW), images_NCHW.shape[-2:])
    return finalize(accumulate(logits, images_NCHW, mode, num_classes))[0]
