"""Test-time augmentation: the views of an image, whole or in crops, and the sum of their class probabilities.

N images, C classes, H W size of the image; a view has the size (int(H * scale), int(W * scale)).

A network may have been told to see whole images at another size than their own (`view_px`): the image is then
resized once, all of the above is of the resized image, and the mask is interpolated from its probabilities.
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
"""Scales of each mode, and whether every scale is also seen mirrored."""


def seen(images_NCHW: torch.Tensor, view_px: int | None) -> torch.Tensor:
    """Images as a network sees them whole.

    Args:
        view_px: their longer side, pixels; None: their own size.

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
    """Size (rows, columns) at which an image is seen; see `seen`."""
    if view_px is None:
        return height, width
    scale = view_px / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def accumulate_views(logits: Callable[[torch.Tensor], torch.Tensor], images_NCHW: torch.Tensor, mode: str,
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
    """As `accumulate_views`, but the network sees overlapping crops, and each has its views.

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
            sums_NCHW[crop] += accumulate_views(logits, images_NCHW[crop], mode, num_classes)
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


def accumulate(predictor: "Predictor", images_NCHW: torch.Tensor, mode: str) -> torch.Tensor:
    """Sums the class probabilities of all views of whole images.

    Args:
        images_NCHW: float32, normalised, of their own size.
        mode: key of `VIEWS`.

    Returns:
        float32 [N, C, h, w] at the size at which the predictor sees them; `concluded` makes masks of it.
    """
    return accumulate_views(predictor.logits, seen(images_NCHW, predictor.view_px), mode,
                            predictor.num_classes)


def masks(predictor: "Predictor", images_NCHW: torch.Tensor, mode: str, *, crop_px: int | None = None,
          edges: WindowEdges = "cut") -> torch.Tensor:
    """The most likely class of every pixel over all views: uint8 [N, H, W].

    Where there is one view of the image's own size no probabilities are computed.

    Args:
        images_NCHW: float32, normalised, of their own size.
        mode: key of `VIEWS`.
        crop_px, edges: see `accumulate_crops`; None: the network sees whole images.
    """
    size = tuple(images_NCHW.shape[-2:])
    if crop_px is not None:
        sums_NCHW = accumulate_crops(predictor.logits, seen(images_NCHW, predictor.view_px), mode,
                                     predictor.num_classes, crop_px, edges)
    elif mode == "none" and view_size(*size, predictor.view_px) == size:
        return upsample_argmax(predictor.logits(images_NCHW), size)
    else:
        sums_NCHW = accumulate(predictor, images_NCHW, mode)
    return concluded(sums_NCHW, size)[0]


def concluded(sums_NCHW: torch.Tensor,
              size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks of summed probabilities, at the size of the images.

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


def resized(sums_NCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Sums at the size (rows, columns) of the images: float32 [N, C, *size]. Labelling does without them."""
    if tuple(sums_NCHW.shape[-2:]) == tuple(size):
        return sums_NCHW
    return F.interpolate(sums_NCHW, size, mode="bilinear", align_corners=True)
