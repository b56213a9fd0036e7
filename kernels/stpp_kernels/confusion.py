"""Operator `confusion`: counts of (truth, prediction) pairs; and `pairwise_iou`, the agreement of two masks.

Shape suffixes: N images, C classes, H W image size.
"""

import torch
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.dispatch import define

IGNORE_INDEX = 255
LABEL_DTYPES = (torch.uint8, torch.int64)


def confusion(
    pred: Tensor, target: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX,
    per_image: bool = False
) -> Tensor:
    """Computes the confusion matrix of two masks: rows are the truth, columns the prediction.

    Eager equivalent: `k = target != ignore_index`;
    `bincount(target[k] * C + pred[k], minlength=C * C).view(C, C)`.

    Args:
        pred: uint8 or int64, any shape (usually [N, H, W]), values in [0, C) at counted pixels.
        target: uint8 or int64, the same shape, values in [0, C) or `ignore_index`.
        num_classes: C, 1..256.
        ignore_index: target value of pixels that do not count.
        per_image: one matrix for each entry of the first dimension.

    Returns:
        int64 [C, C], or [N, C, C] with `per_image`. Zeros if every pixel is ignored.

    Raises:
        ValueError: shapes that differ, a num_classes outside 1..256, or (CPU) a value outside the classes,
            which is given. On CUDA such a value fails an asynchronous assertion and is not counted.
        TypeError: a dtype other than uint8 and int64.
    """
    return _checked(pred, target, num_classes, ignore_index, per_image, False)


def class_pixels(masks: Tensor, num_classes: int, *, per_image: bool = False) -> Tensor:
    """Counts the pixels of each class in masks: the diagonal of `confusion` of a mask with itself.

    Args:
        masks, num_classes, per_image: see `confusion`; 255 is not counted.

    Returns:
        int64 [C], or [N, C] with `per_image`.
    """
    return confusion(masks, masks, num_classes, per_image=per_image).diagonal(dim1=-2, dim2=-1)


def pairwise_iou(a: Tensor, b: Tensor, num_classes: int) -> Tensor:
    """Computes the agreement of two masks per image: the mean IoU over the classes present in either mask.

    A class in only one of the masks scores 0; a class in neither is left out of the mean, as are pixels that
    are 255 in either mask. This is the reliability of ST++. Eager equivalent: per image,
    `m = confusion(a, b)`; `u = m.sum(0) + m.sum(1) - m.diag()`; `(m.diag() / u)[u > 0].mean()`.

    Args:
        a, b: uint8 or int64 [N, H, W], values in [0, C) or 255.
        num_classes: C, 1..256.

    Returns:
        float64 [N] in [0, 1]; 0 for an image with no pixel to compare.

    Raises:
        ValueError, TypeError: as `confusion`.
    """
    return reference.iou_from_confusion(_checked(b, a, num_classes, IGNORE_INDEX, True, True))


def _checked(pred: Tensor, target: Tensor, num_classes: int, ignore: int, per_image: bool,
             ignore_both: bool) -> Tensor:
    for name, mask in (("pred", pred), ("target", target)):
        if mask.dtype not in LABEL_DTYPES:
            raise TypeError(f"{name} is {mask.dtype}; expected torch.uint8 or torch.int64")
    if pred.shape != target.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}; expected the "
                         "same")
    if pred.device != target.device:
        raise ValueError(f"pred is on {pred.device} and target on {target.device}; expected one device")
    if not 1 <= num_classes <= 256:
        raise ValueError(f"num_classes is {num_classes}; expected 1 to 256")
    if per_image and pred.dim() < 1:
        raise ValueError("one matrix per image needs masks with a first dimension of images")
    return _op(pred, target, num_classes, ignore, per_image, ignore_both)


def _reference(
    pred: Tensor, target: Tensor, num_classes: int, ignore: int, per_image: bool, ignore_both: bool
) -> Tensor:
    if not per_image:
        pred, target = pred.reshape(1, -1), target.reshape(1, -1)
    pred, target = pred.reshape(pred.shape[0], -1), target.reshape(target.shape[0], -1)
    if ignore_both:
        target = torch.where(pred == ignore, ignore, target.long())
    matrix_NCC = reference.confusion(pred, target, num_classes, ignore)
    return matrix_NCC if per_image else matrix_NCC[0]


def _fake(pred: Tensor, target: Tensor, num_classes: int, ignore: int, per_image: bool,
          ignore_both: bool) -> Tensor:
    shape = (num_classes, num_classes)
    return target.new_empty((target.shape[0], *shape) if per_image else shape, dtype=torch.int64)


_op = define(
    "confusion",
    "(Tensor pred, Tensor target, int num_classes, int ignore_index, bool per_image, bool ignore_both) -> "
    "Tensor",
    reference=_reference,
    fake=_fake,
    triton="triton.confusion:confusion",
    float_arg=None,
)
