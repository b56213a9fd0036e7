"""`confusion` on CUDA: int64 counts of (truth, prediction) pairs.

Up to `HISTOGRAM_CLASSES` classes each program counts its pixels in its own histogram and adds that to the
result. Above, the histogram would be too large, and a program adds runs of equal pairs, of which masks mostly
consist: a run from pixel a to pixel b has (b + 1) - a pixels, so every end adds its position plus one and
every beginning subtracts its position, at most two atomic additions per run of any length. Sums of integers
do not depend on their order, so both are deterministic.

A value outside the classes is not counted and sets a flag, which fails an asynchronous assertion on the
stream.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HISTOGRAM_CLASSES = 45
HISTOGRAM_BLOCK = 4096
RUNS_BLOCK = 1024


@triton.jit
def _cell(pred, target, pixel, inside, ignore, classes, IGNORE_BOTH: tl.constexpr):
    """Computes (pair number of the pixels, or classes * classes if not counted; True if a value is outside
    the classes)."""
    p = tl.load(pred + pixel, mask=inside, other=0).to(tl.int64)
    t = tl.load(target + pixel, mask=inside, other=0).to(tl.int64)
    counts = inside & (t != ignore)
    if IGNORE_BOTH:
        counts = counts & (p != ignore)
    valid = (p >= 0) & (p < classes) & (t >= 0) & (t < classes)
    return tl.where(counts & valid, t * classes + p, classes * classes).to(tl.int32), counts & ~valid


@triton.jit(do_not_specialize=["pixels", "ignore", "classes"])
def _confusion_kernel(
    pred, target, matrix, wrong, pixels, ignore, classes,
    IGNORE_BOTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pred, target = pred + n * pixels + first, target + n * pixels + first
    at = tl.arange(0, BLOCK)
    length = tl.minimum(pixels - first, BLOCK).to(tl.int32)
    cell, outside = _cell(pred, target, at, at < length, ignore, classes, IGNORE_BOTH)
    tl.store(wrong + at * 0, 1, mask=outside)
    cells = classes * classes
    image = matrix + n * cells
    if BINS > 0:
        sums = tl.histogram(cell, BINS)
        bins = tl.arange(0, BINS)
        tl.atomic_add(image + bins, sums.to(tl.int64), mask=(bins < cells) & (sums > 0), sem="relaxed")
    else:
        before, _ = _cell(pred, target, at - 1, (at > 0) & (at < length), ignore, classes, IGNORE_BOTH)
        after, _ = _cell(pred, target, at + 1, at + 1 < length, ignore, classes, IGNORE_BOTH)
        begins, ends = (at == 0) | (before != cell), (at == length - 1) | (after != cell)
        change = tl.where(ends, at + 1, 0) - tl.where(begins, at, 0)
        tl.atomic_add(image + cell, change.to(tl.int64), mask=(cell < cells) & (change != 0), sem="relaxed")


def confusion(
    pred: Tensor, target: Tensor, num_classes: int, ignore_index: int, per_image: bool, ignore_both: bool
) -> Tensor:
    """Implements the operator; see `stpp_kernels.confusion`."""
    pred, target = pred.contiguous(), target.contiguous()
    images = target.shape[0] if per_image else 1
    matrix = torch.zeros((images, num_classes, num_classes), dtype=torch.int64, device=target.device)
    if target.numel() > 0:
        pixels = target.numel() // images
        wrong = torch.zeros(1, dtype=torch.int32, device=target.device)
        bins = triton.next_power_of_2(num_classes * num_classes
                                      + 1) if num_classes <= HISTOGRAM_CLASSES else 0
        block, warps = (HISTOGRAM_BLOCK, 8) if bins else (RUNS_BLOCK, 4)
        with torch.cuda.device_of(target):
            _confusion_kernel[(triton.cdiv(pixels, block), images)](
                pred, target, matrix, wrong, pixels, ignore_index, num_classes,
                IGNORE_BOTH=ignore_both, BINS=bins, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        message = (
            f"a mask holds a value outside [0, {num_classes}) that is not the ignore index {ignore_index}"
        )
        torch._assert_async(wrong[0] == 0, message)
    return matrix if per_image else matrix[0]
