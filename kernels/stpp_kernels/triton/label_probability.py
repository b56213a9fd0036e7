"""`label_probability` on CUDA: one program computes a segment of one output row, in one pass over the
classes.

Per pixel and class the kernel blends the four corner logits and keeps the running maximum m, the sum of
exponentials relative to it (rescaled whenever the maximum changes, as in online softmax), and the logit l of
the pixel's label: p = exp(l - m) / sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels.triton.resize import block_width, image_and_row, logit, source, step

# One compiled variant for all image sizes.
SIZES = ["stride_n", "stride_c", "stride_h", "stride_w", "in_height", "in_width", "height", "width",
         "classes", "ignore_index"]
IGNORED = tl.constexpr(2.0)


@triton.jit(do_not_specialize=SIZES)
def _probability_kernel(
    logits, labels, probability,
    stride_n, stride_c, stride_h, stride_w,
    in_height, in_width, height, width, step_y, step_x, classes, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n, y = image_and_row(height)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    top, bottom, low = source(y, step_y, in_height)
    left, right, near = source(x, step_x, in_width)
    image = logits + n * stride_n
    row_top, row_bottom = image + top * stride_h, image + bottom * stride_h
    left, right = left * stride_w, right * stride_w
    out = (n * height + y) * width + x
    label = tl.load(labels + out, mask=inside, other=0).to(tl.int32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    own = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for c in range(0, classes):
        at = tl.cast(c, tl.int64) * stride_c
        value = logit(row_top + at, row_bottom + at, low, left, right, near, inside)
        most = tl.maximum(value, best)
        total = total * tl.exp(best - most) + tl.exp(value - most)
        best = most
        own = tl.where(label == c, value, own)
    own_probability = tl.exp(own - best) / total
    tl.store(probability + out, tl.where(label == ignore_index, IGNORED, own_probability), mask=inside)


def label_probability(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Implements the operator; see `stpp_kernels.label_probability`."""
    batch, height, width = labels.shape
    classes, in_height, in_width = logits.shape[1:]
    probability = torch.empty((batch, height, width), dtype=torch.float32, device=logits.device)
    if probability.numel() > 0:
        block = block_width(width)
        with torch.cuda.device_of(logits):
            _probability_kernel[(batch * height, triton.cdiv(width, block))](
                logits, labels, probability, *logits.stride(),
                in_height, in_width, height, width, step(in_height, height), step(in_width, width), classes,
                ignore_index, BLOCK=block, num_warps=max(1, block // 128),
            )  # fmt: skip
    return probability
