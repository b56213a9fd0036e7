"""Operator `label_probability`: probability of each pixel's label, with no full-size logits; used by OHEM to
rank pixels.

Shape suffixes: N images, C classes, h w size of the logits, H W size of the labels.
"""

import torch
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.argmax import check_logits
from stpp_kernels.dispatch import define

IGNORED = 2.0
"""Value of ignored pixels, above all probabilities."""


def label_probability(logits_NChw: Tensor, labels_NHW: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Computes the softmax probability of each pixel's label in the logits resized to the labels' size.

    Eager equivalent: `F.interpolate(logits.float(), labels.shape[1:], mode="bilinear",
    align_corners=True).softmax(1).gather(1, labels[:, None].long())[:, 0]`, and 2 where the label is
    `ignore_index`. Not differentiable.

    Args:
        logits_NChw: float32, float16, bfloat16 or float64, C in 1..256, any strides. Finite.
        labels_NHW: uint8; each below C, or `ignore_index`.
        ignore_index: label of ignored pixels.

    Returns:
        float32 [N, H, W] in [0, 1], and 2 where a pixel is ignored. A label outside the classes has
        probability 0.

    Raises:
        ValueError: shapes that do not fit, or more than 256 classes.
        TypeError: logits that are not floating point, or labels that are not uint8.
    """
    check_logits(logits_NChw)
    if labels_NHW.dtype != torch.uint8:
        raise TypeError(f"labels are {labels_NHW.dtype}; expected uint8")
    if labels_NHW.dim() != 3 or labels_NHW.shape[0] != logits_NChw.shape[0]:
        raise ValueError(f"labels have shape {tuple(labels_NHW.shape)}; expected [{logits_NChw.shape[0]}, H, "
                         "W]")
    return _op(logits_NChw.detach(), labels_NHW.contiguous(), ignore_index)


def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return reference.label_probability(logits, labels, ignore_index).float()


def _fake(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.float32)


_op = define(
    "label_probability",
    "(Tensor logits, Tensor labels, int ignore_index) -> Tensor",
    reference=_reference,
    fake=_fake,
    triton="triton.label_probability:label_probability",
)
