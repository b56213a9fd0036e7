"""Test-time augmentation: views of an image, whole or in windows, and the sum of their class probabilities.

N images, C classes, H W size of the image; a view has the size (int(H * scale), int(W * scale)).

With `view_px` the image is resized once, all of the above refers to the resized image, and the mask is
interpolated from its probabilities.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from stpp.config import WindowEdges
from stpp_kernels import class_pixels, finalize, softmax_accumulate, upsample_argmax

if TYPE_CHECKING:
    from stpp.inference.protocol import Predictor

VIEWS: dict[str, tuple[tuple[float, ...], bool]] = {
    "stpp": ((0.5, 0.75, 1.0, 1.5, 2.0), True),
    "flip": ((1.0,), True),
    "none": ((1.0,), False),
}
"""Scales of each mode, and True if every scale has a mirrored view."""


def resize_to_view(images_NCHW: torch.Tensor, view_px: int | None) -> torch.Tensor:
    """Resizes whole images for the network.

    Args:
        view_px: longer side, in pixels; None: original size.

    Returns:
        float32 [N, 3, h, w], channels_last.
    """
    height, width = images_NCHW.shape[-2:]
    size = view_size(height, width, view_px)
    if size == (height, width):
        return images_NCHW
    return F.interpolate(images_NCHW, size, mode="bilinear", align_corners=False, antialias=True).contiguous(
        memory_format=torch.channels_last)


def view_size(height: int, width: int, view_px: int | None) -> tuple[int, int]:
    """Computes the size (rows, columns) of an image after `resize_to_view`."""
    if view_px is None:
        return height, width
    scale = view_px / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def accumulate_views(logits: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor, mode: str,
                     num_classes: int) -> torch.Tensor:
    """Sums the class probabilities of all views at the size of the image.

    A view and its mirror image pass through the network as one batch of 2N.

    Args:
        logits: function from images to low-resolution logits.
        images_NCHW: float32, normalised.
        mode: key of `VIEWS`.

    Returns:
        float32 [N, C, H, W]: sum over views; divide by their number for probabilities.

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
    """Sums the class probabilities, as `accumulate_views`, over sliding windows, each with all its views.

    The stride is two thirds of a window; see `window_starts` for the image edge. An image smaller than a
    window is one window.

    Args:
        crop_px: side of the square windows, in pixels.
        edges: windows at the image edge.

    Returns:
        float32 [N, C, H, W]: sum over windows and views. The number of windows differs between pixels but is
        the same for all classes of a pixel, so the largest sum is the largest mean.

    Source: sliding-window evaluation of Cityscapes in the public code of UniMatch (arXiv 2208.09910) and of
    UniMatch-V2 (arXiv 2410.10777).
    """
    count, _, height, width = images_NCHW.shape
    sums_NCHW = images_NCHW.new_zeros(count, num_classes, height, width)
    for top in window_starts(height, crop_px, edges):
        for left in window_starts(width, crop_px, edges):
            crop = (..., slice(top, top + crop_px), slice(left, left + crop_px))
            sums_NCHW[crop] += accumulate_views(logits, images_NCHW[crop], mode, num_classes)
    return sums_NCHW


def window_starts(length: int, crop_px: int, edges: WindowEdges) -> list[int]:
    """First rows, or columns, of the windows along a side of `length` pixels.

    The stride is two thirds of a window. "cut": windows start up to the end of the image, so the last ones
    may be small, and lie within others; "shifted": the last window ends with the image, at full size.
    """
    step = max(1, 2 * crop_px // 3)
    if edges == "cut":
        return list(range(0, length, step))
    last = max(0, length - crop_px)
    return [*range(0, last, step), last]


def accumulate(predictor: "Predictor", images_NCHW: torch.Tensor, mode: str) -> torch.Tensor:
    """Sums the class probabilities of all views of whole images.

    Args:
        images_NCHW: float32, normalised, at original size.
        mode: key of `VIEWS`.

    Returns:
        float32 [N, C, h, w] at the predictor's view size; `masks_of_sums` converts it to masks.
    """
    return accumulate_views(predictor.logits, resize_to_view(images_NCHW, predictor.view_px), mode,
                            predictor.num_classes)


class _Watched:
    """Predictor that records which of N images had finite logits in all calls."""

    def __init__(self, predictor: "Predictor", count: int, device: torch.device):
        self._predictor = predictor
        self.num_classes, self.view_px = predictor.num_classes, predictor.view_px
        self.finite_N = torch.ones(count, dtype=torch.bool, device=device)

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        low_NChw = self._predictor.logits(images_NCHW)
        finite = low_NChw.isfinite().flatten(1).all(1)
        self.finite_N &= finite.view(-1, len(self.finite_N)).all(0)  # mirrored views follow the others
        return low_NChw


def finite_masks(predictor: "Predictor", images_NCHW: torch.Tensor, mode: str,
                 **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicts masks as `masks`, and whether all logits of an image were finite: bool [N]; otherwise its mask
    is meaningless (class 0)."""
    watched = _Watched(predictor, len(images_NCHW), images_NCHW.device)
    return masks(watched, images_NCHW, mode, **options), watched.finite_N


def masks(predictor: "Predictor", images_NCHW: torch.Tensor, mode: str, *, crop_px: int | None = None,
          edges: WindowEdges = "cut") -> torch.Tensor:
    """Predicts the most likely class of every pixel over all views: uint8 [N, H, W].

    For a single view at original size no probabilities are computed.

    Args:
        images_NCHW: float32, normalised, at original size.
        mode: key of `VIEWS`.
        crop_px, edges: see `accumulate_crops`; None: whole images.
    """
    size = tuple(images_NCHW.shape[-2:])
    if crop_px is not None:
        sums_NCHW = accumulate_crops(predictor.logits, resize_to_view(images_NCHW, predictor.view_px), mode,
                                     predictor.num_classes, crop_px, edges)
    elif mode == "none" and view_size(*size, predictor.view_px) == size:
        return upsample_argmax(predictor.logits(images_NCHW), size)
    else:
        sums_NCHW = accumulate(predictor, images_NCHW, mode)
    return masks_of_sums(sums_NCHW, size)[0]


def masks_of_sums(sums_NCHW: torch.Tensor,
                  size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Converts summed probabilities to masks at the size of the images.

    Args:
        sums_NCHW: see `accumulate`.
        size: (rows, columns) of the images.

    Returns:
        masks, uint8 [N, *size]; mean share of the chosen class at the size of the sums, float32 [N]; pixels
        of each class, int64 [N, C].
    """
    masks_NHW, confidence_N, pixels_NC = finalize(sums_NCHW)
    if tuple(sums_NCHW.shape[-2:]) != size:
        masks_NHW = upsample_argmax(sums_NCHW, size)
        pixels_NC = class_pixels(masks_NHW, sums_NCHW.shape[1], per_image=True)
    return masks_NHW, confidence_N, pixels_NC


def confidence_of_sums(sums_NCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Computes the confidence of every pixel of the images, the chosen class's share of the summed
    probabilities: float32 [N, *size]. Classes are resized one by one: all of them would need C times as much
    memory."""
    if tuple(sums_NCHW.shape[-2:]) == tuple(size):
        return sums_NCHW.amax(1) / sums_NCHW.sum(1)
    most_N1HW = resize_sums(sums_NCHW[:, :1], size)
    for i in range(1, sums_NCHW.shape[1]):
        most_N1HW = torch.maximum(most_N1HW, resize_sums(sums_NCHW[:, i : i + 1], size))
    return (most_N1HW / resize_sums(sums_NCHW.sum(1, keepdim=True), size))[:, 0]


def resize_sums(sums_NCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes sums to the size (rows, columns) of the images: float32 [N, C, *size]. Masks do not need
    this."""
    if tuple(sums_NCHW.shape[-2:]) == tuple(size):
        return sums_NCHW
    return F.interpolate(sums_NCHW, size, mode="bilinear", align_corners=True)
