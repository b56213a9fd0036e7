"""Operator `upsample_argmax`: class mask at full size from low-resolution logits, with no full-size logits.

Shape suffixes: N images, C classes, h w size of the logits, H W size of the mask.
"""

import torch
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.dispatch import define

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def upsample_argmax(
    logits_NChw: Tensor, size: tuple[int, int], *, confidence: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the most likely class of every pixel of the logits resized to `size`, and optionally its
    softmax probability.

    Eager equivalent:
    `F.interpolate(logits.float(), size, mode="bilinear", align_corners=True).argmax(1).byte()`; the
    confidence is `.softmax(1).amax(1)` of the same. Not differentiable.

    Args:
        logits_NChw: float32, float16, bfloat16 or float64, C in 1..256, any strides. Finite.
        size: (H, W) of the mask, larger or smaller than (h, w); if equal, the operator is a plain argmax.
        confidence: also return the probability of the chosen class, computed in float32 (float64 for float64
            logits).

    Returns:
        The mask, uint8 [N, H, W]; with `confidence`, (mask, probability in (0, 1], float32 [N, H, W]). Ties
        go to the lowest class.

    Raises:
        ValueError: not four dimensions, more than 256 classes, or an empty size.
        TypeError: logits that are not floating point.
    """
    check_logits(logits_NChw)
    height, width = check_size("size", size)
    mask, probability = _op(logits_NChw.detach(), [height, width], confidence)
    return (mask, probability) if confidence else mask


def check_logits(logits_NChw: Tensor) -> None:
    """Checks that these are logits [N, C, h, w] of 1 to 256 classes, with at least one pixel.

    Raises:
        ValueError, TypeError: they are not.
    """
    if logits_NChw.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"logits are {logits_NChw.dtype}; expected one of {', '.join(map(str, LOGIT_DTYPES))}"
        )
    if logits_NChw.dim() != 4:
        raise ValueError(f"logits have shape {tuple(logits_NChw.shape)}; expected [N, C, h, w]")
    if not 1 <= logits_NChw.shape[1] <= 256:
        raise ValueError(f"logits have {logits_NChw.shape[1]} classes; a uint8 mask holds 1 to 256")
    if logits_NChw.shape[2] < 1 or logits_NChw.shape[3] < 1:
        raise ValueError(f"logits have shape {tuple(logits_NChw.shape)}; expected at least one pixel")


def check_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Converts the argument `name` to (height, width).

    Raises:
        ValueError: it is not two positive numbers.
    """
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"{name} is {tuple(size)}; expected (height, width), both at least 1")
    return size[0], size[1]


def _reference(logits: Tensor, size: list[int], confidence: bool) -> tuple[Tensor, Tensor]:
    mask, probability = reference.upsample_argmax(logits, (size[0], size[1]))
    return mask, probability.float() if confidence else _no_confidence(logits)


def _fake(logits: Tensor, size: list[int], confidence: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], size[0], size[1])
    probability = logits.new_empty(shape, dtype=torch.float32) if confidence else _no_confidence(logits)
    return logits.new_empty(shape, dtype=torch.uint8), probability


def _no_confidence(logits: Tensor) -> Tensor:
    return logits.new_empty(0, dtype=torch.float32)


_op = define(
    "upsample_argmax",
    "(Tensor logits, SymInt[2] size, bool confidence) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    triton="triton.argmax:upsample_argmax",
)
