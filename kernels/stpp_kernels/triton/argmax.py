"""`upsample_argmax` on CUDA: one program computes a segment of one output row, in one pass over the classes.

Per pixel and class the kernel blends the four corner logits, which neighbouring pixels share through the
cache, and keeps the running maximum, its class and, for the confidence, the sum of exponentials relative to
it (rescaled whenever the maximum changes, as in online softmax). Nothing of size [N, C, H, W] is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels.triton.resize import block_width, image_and_row, logit, source, step

# One compiled variant for all image sizes.
SIZES = ["stride_n", "stride_c", "stride_h", "stride_w", "in_height", "in_width", "height", "width",
         "classes"]


@triton.jit(do_not_specialize=SIZES)
def _argmax_kernel(
    logits, mask, confidence,
    stride_n, stride_c, stride_h, stride_w,
    in_height, in_width, height, width, step_y, step_x, classes,
    WITH_CONFIDENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, y = image_and_row(height)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    top, bottom, low = source(y, step_y, in_height)
    left, right, near = source(x, step_x, in_width)
    image = logits + n * stride_n
    row_top, row_bottom = image + top * stride_h, image + bottom * stride_h
    left, right = left * stride_w, right * stride_w
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    arg = tl.zeros([BLOCK], tl.int32)
    for c in range(0, classes):
        at = tl.cast(c, tl.int64) * stride_c
        value = logit(row_top + at, row_bottom + at, low, left, right, near, inside)
        larger = value > best  # strictly: the lowest class keeps a tie
        if WITH_CONFIDENCE:
            most = tl.where(larger, value, best)
            total = total * tl.exp(best - most) + tl.exp(value - most)
        best = tl.where(larger, value, best)
        arg = tl.where(larger, c, arg)
    out = (n * height + y) * width + x
    tl.store(mask + out, arg.to(tl.uint8), mask=inside)
    if WITH_CONFIDENCE:
        tl.store(confidence + out, 1.0 / total, mask=inside)


def upsample_argmax(logits: Tensor, size: list[int], confidence: bool) -> tuple[Tensor, Tensor]:
    """Implements the operator; see `stpp_kernels.argmax`."""
    batch, classes, in_height, in_width = logits.shape
    height, width = size
    mask = torch.empty((batch, height, width), dtype=torch.uint8, device=logits.device)
    shape = (batch, height, width) if confidence else (0,)
    probability = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if batch > 0:
        block = block_width(width)
        with torch.cuda.device_of(logits):
            _argmax_kernel[(batch * height, triton.cdiv(width, block))](
                logits, mask, probability, *logits.stride(),
                in_height, in_width, height, width, step(in_height, height), step(in_width, width), classes,
                WITH_CONFIDENCE=confidence, BLOCK=block, num_warps=max(1, block // 128),
            )  # fmt: skip
    return mask, probability
