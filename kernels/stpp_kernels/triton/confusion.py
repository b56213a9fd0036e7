"""`confusion` on CUDA: int64 counts of (truth, prediction) pairs.

Up to `HISTOGRAM_CLASSES` classes each program counts its pixels in a histogram of its own and adds what it found to the result;
above, the table would not fit into shared memory and each pixel is one atomic addition. Sums of integers do not depend
on their order, so both give the same bits in every run.

A value outside the classes is counted nowhere and raises a flag, which fails an assert on the stream: nothing waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HISTOGRAM_CLASSES = 45
BLOCK = 4096


@triton.jit
def _confusion_kernel(
    pred, target, matrix, wrong, pixels, ignore, classes,
    IGNORE_BOTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    p = tl.load(pred + n * pixels + pixel, mask=inside, other=0).to(tl.int64)
    t = tl.load(target + n * pixels + pixel, mask=inside, other=0).to(tl.int64)
    counts = inside & (t != ignore)
    if IGNORE_BOTH:
        counts = counts & (p != ignore)
    valid = (p >= 0) & (p < classes) & (t >= 0) & (t < classes)
    tl.store(wrong + pixel * 0, 1, mask=counts & ~valid)
    counts = counts & valid
    cells = classes * classes
    cell = tl.where(counts, t * classes + p, cells).to(tl.int32)
    image = matrix + n * cells
    if BINS > 0:
        found = tl.histogram(cell, BINS)
        bins = tl.arange(0, BINS)
        tl.atomic_add(image + bins, found.to(tl.int64), mask=(bins < cells) & (found > 0), sem="relaxed")
    else:
        tl.atomic_add(image + cell, tl.full([BLOCK], 1, tl.int64), mask=counts, sem="relaxed")


def confusion(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int, per_image: bool, ignore_both: bool
) -> Tensor:
    """Arguments and result as those of the operator; see `stpp_kernels.confusion`."""
    pred, target = pred.contiguous(), target.contiguous()
    images = target.shape[0] if per_image else 1
    matrix = torch.zeros((images, num_classes, num_classes), dtype=torch.int64, device=target.device)
    if target.numel() > 0:
        pixels = target.numel() // images
        wrong = torch.zeros(1, dtype=torch.int32, device=target.device)
        bins = triton.next_power_of_2(num_classes * num_classes + 1) if num_classes <= HISTOGRAM_CLASSES else 0
        with torch.cuda.device_of(target):
            _confusion_kernel[(triton.cdiv(pixels, BLOCK), images)](
                pred, target, matrix, wrong, pixels, ignore_index, num_classes,
                IGNORE_BOTH=ignore_both, BINS=bins, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        message = f"a mask holds a value outside [0, {num_classes}) that is not the ignore index {ignore_index}"
        torch._assert_async(wrong[0] == 0, message)
    return matrix if per_image else matrix[0]
