"""Operators `softmax_accumulate` and `finalize`: test-time augmentation that stores no probabilities at the
scaled size.

Shape suffixes: N images, C classes, h w size of the logits, H W size of the image.
"""

import torch
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.argmax import check_logits, check_size
from stpp_kernels.dispatch import define


def softmax_accumulate(
    acc_NCHW: Tensor,
    logits_NChw: Tensor,
    scaled_size: tuple[int, int],
    size: tuple[int, int],
    flip: bool = False,
    *,
    pair: bool = False,
) -> None:
    """Adds a view of test-time augmentation, or a view and its mirror image, to the sum of class
    probabilities, in place.

    Eager equivalent:
    `p = F.interpolate(logits.float(), scaled_size, mode="bilinear", align_corners=True).softmax(1)`;
    `acc += F.interpolate(p.flip(3) if flip else p, size, mode="bilinear", align_corners=True)`. Not
    differentiable.

    Args:
        acc_NCHW: float32 sums so far, zeros at first. Any strides; contiguous is the fastest layout, on the
            CPU and on CUDA, because both iterate along the width (channels_last takes up to twice the time).
        logits_NChw: float32, float16, bfloat16 or float64, C in 1..256, any strides. Finite. [2N, C, h, w]
            with `pair`.
        scaled_size: (height, width) of the view; the softmax is computed at this size.
        size: (H, W) of `acc_NCHW`.
        flip: the view was mirrored left to right; its probabilities are mirrored back.
        pair: the logits hold the views of all images, followed by those of their mirror images. Equivalent,
            bitwise on a CPU, to `softmax_accumulate(acc, logits[:N], ..., flip)` and then
            `softmax_accumulate(acc, logits[N:], ..., not flip)`. On CUDA the sums are read and written once.

    Raises:
        ValueError: inconsistent shapes or devices, more than 256 classes, an empty size, or a sum whose
            elements share memory.
        TypeError: sums that are not float32, or logits that are not floating point.
    """
    check_logits(logits_NChw)
    scaled_height, scaled_width = check_size("scaled_size", scaled_size)
    height, width = check_size("size", size)
    if acc_NCHW.dtype != torch.float32:
        raise TypeError(f"the sum is {acc_NCHW.dtype}; expected torch.float32")
    if pair and logits_NChw.shape[0] % 2:
        raise ValueError(f"a pair needs logits [2N, C, h, w], got {tuple(logits_NChw.shape)}")
    expected = (logits_NChw.shape[0] // (2 if pair else 1), logits_NChw.shape[1], height, width)
    if tuple(acc_NCHW.shape) != expected:
        raise ValueError(f"the sum has shape {tuple(acc_NCHW.shape)}; these logits and size need {expected}")
    if any(stride == 0 and size > 1 for stride, size in zip(acc_NCHW.stride(), acc_NCHW.shape, strict=True)):
        raise ValueError("the sum shares memory between its elements (an expanded tensor); make it with "
                         "torch.zeros")
    if acc_NCHW.device != logits_NChw.device:
        raise ValueError(f"the sum is on {acc_NCHW.device} and the logits on {logits_NChw.device}; expected "
                         "one device")
    _accumulate_op(acc_NCHW, logits_NChw.detach(), [scaled_height, scaled_width], [height, width], flip, pair)


def finalize(acc_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the mask, mean probability and class counts of accumulated probabilities.

    Eager equivalent: `value, mask = acc.max(1)`; `(value / acc.sum(1)).mean((1, 2))`; per image
    `bincount(mask, minlength=C)`.

    Args:
        acc_NCHW: float32, non-negative, positive somewhere in every pixel; C in 1..256, any strides
            (contiguous is fastest).

    Returns:
        mask: uint8 [N, H, W]; ties go to the lowest class.
        mean_probability: float32 [N], mean over pixels of the chosen class's share of the pixel's sum, in
            (0, 1]; NaN if a pixel's sum is zero.
        class_counts: int64 [N, C], pixels per class.

    Raises:
        ValueError: not four dimensions, more than 256 classes, or no pixel.
        TypeError: not float32.
    """
    check_logits(acc_NCHW)
    if acc_NCHW.dtype != torch.float32:
        raise TypeError(f"the sum is {acc_NCHW.dtype}; expected torch.float32")
    return _finalize_op(acc_NCHW.detach())


def _accumulate_reference(
    acc: Tensor, logits: Tensor, scaled_size: list[int], size: list[int], flip: bool, pair: bool
) -> None:
    views = logits.chunk(2) if pair else [logits]
    for view, mirrored in zip(views, (flip, not flip), strict=False):
        reference.softmax_accumulate(acc, view, (scaled_size[0], scaled_size[1]), (size[0], size[1]),
                                     mirrored)


def _accumulate_fake(acc, logits, scaled_size, size, flip, pair) -> None:
    return None


def _finalize_fake(acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, classes, height, width = acc.shape
    mask = acc.new_empty((images, height, width), dtype=torch.uint8)
    return mask, acc.new_empty(images), acc.new_empty((images, classes), dtype=torch.int64)


_accumulate_op = define(
    "softmax_accumulate",
    "(Tensor(a!) acc, Tensor logits, SymInt[2] scaled_size, SymInt[2] size, bool flip, bool pair) -> ()",
    reference=_accumulate_reference,
    fake=_accumulate_fake,
    triton="triton.softmax_accumulate:softmax_accumulate",
    float_arg=1,
)
_finalize_op = define(
    "finalize",
    "(Tensor acc) -> (Tensor, Tensor, Tensor)",
    reference=reference.finalize,
    fake=_finalize_fake,
    triton="triton.softmax_accumulate:finalize",
)
