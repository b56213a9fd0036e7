"""`softmax_accumulate` and `finalize` on CUDA.

Accumulation takes two kernels. The first computes, for every pixel at the scaled size, the maximum over the
classes and the inverse of the sum of exponentials relative to it: 2 / C of the memory of the eager form. The
second computes segments of output rows: an output pixel blends four pixels of the scaled size, whose
probability of a class is exp(logit - maximum) times that inverse, with the logit blended from low resolution
on the fly. It recomputes up to four exponentials per element, which cost less than the memory traffic they
save, and only one if `size` equals the scaled size. A view and its mirror image are added in one pass: the
sums are read and written once for both.

There are no atomics on floating-point numbers, so the result is bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels.triton.resize import block_width, image_and_row, logit, source, step

# One compiled variant for all sizes of images and views.
LOGIT_SIZES = ["stride_n", "stride_c", "stride_h", "stride_w", "in_height", "in_width", "classes"]
SCALED_SIZES = [*LOGIT_SIZES, "height", "width"]
SUM_SIZES = [*LOGIT_SIZES, "images", "acc_n", "acc_c", "acc_h", "acc_w", "scaled_height", "scaled_width",
             "height", "width"]


@triton.jit(do_not_specialize=SCALED_SIZES)
def _logsumexp_kernel(
    logits, plane, stride_n, stride_c, stride_h, stride_w,
    in_height, in_width, height, width, step_y, step_x, classes, BLOCK: tl.constexpr,
):  # fmt: skip
    n, y = image_and_row(height)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    top, bottom, low = source(y, step_y, in_height)
    left, right, near = source(x, step_x, in_width)
    row_top = logits + n * stride_n + top * stride_h
    row_bottom = logits + n * stride_n + bottom * stride_h
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for c in range(0, classes):
        at = tl.cast(c, tl.int64) * stride_c
        value = logit(row_top + at, row_bottom + at, low, left * stride_w, right * stride_w, near, inside)
        most = tl.maximum(best, value)
        total = total * tl.exp(best - most) + tl.exp(value - most)
        best = most
    # Stored separately, not as one log-sum-exp: next to a logit of 1e4 the logarithm of the total would be
    # rounded away.
    out = (n * height + y) * width + x
    tl.store(plane + 2 * out, best, mask=inside)
    tl.store(plane + 2 * out + 1, 1.0 / total, mask=inside)


@triton.jit
def _columns(
    row0, row1, x0, x1, low, near, inside, logit_step_x, in_width, stride_w, SAME: tl.constexpr
):  # fmt: skip
    """Computes the class-independent values of the two columns x0 and x1 at the scaled size: offsets and
    weights of their logits, the maxima of the (up to) four pixels, and the inverse sums of exponentials times
    their weights in the resized probability."""
    left0, right0, near0 = source(x0, logit_step_x, in_width)
    left1, right1, near1 = source(x1, logit_step_x, in_width)
    most00 = tl.load(row0 + 2 * x0, mask=inside, other=0.0)
    scale00 = tl.load(row0 + 2 * x0 + 1, mask=inside, other=0.0)
    most01, most10, most11, scale01, scale10, scale11 = most00, most00, most00, scale00, scale00, scale00
    if not SAME:
        most01 = tl.load(row0 + 2 * x1, mask=inside, other=0.0)
        most10 = tl.load(row1 + 2 * x0, mask=inside, other=0.0)
        most11 = tl.load(row1 + 2 * x1, mask=inside, other=0.0)
        scale01 = tl.load(row0 + 2 * x1 + 1, mask=inside, other=0.0) * near * (1.0 - low)
        scale10 = tl.load(row1 + 2 * x0 + 1, mask=inside, other=0.0) * (1.0 - near) * low
        scale11 = tl.load(row1 + 2 * x1 + 1, mask=inside, other=0.0) * near * low
        scale00 = scale00 * (1.0 - near) * (1.0 - low)
    return (
        left0 * stride_w, right0 * stride_w, near0, left1 * stride_w, right1 * stride_w, near1,
        most00, most01, most10, most11, scale00, scale01, scale10, scale11,
    )  # fmt: skip


@triton.jit
def _add(sums, a, b, d, e, low0, low1, columns, inside, SAME: tl.constexpr):
    """Adds the probability of a class to `sums`; a, b and d, e are the rows of logits around the two scaled
    rows."""
    (left0, right0, near0, left1, right1, near1,
     most00, most01, most10, most11, scale00, scale01, scale10, scale11) = columns  # fmt: skip
    sums += tl.exp(logit(a, b, low0, left0, right0, near0, inside) - most00) * scale00
    if not SAME:
        sums += tl.exp(logit(a, b, low0, left1, right1, near1, inside) - most01) * scale01
        sums += tl.exp(logit(d, e, low1, left0, right0, near0, inside) - most10) * scale10
        sums += tl.exp(logit(d, e, low1, left1, right1, near1, inside) - most11) * scale11
    return sums


@triton.jit(do_not_specialize=SUM_SIZES)
def _accumulate_kernel(
    acc, logits, plane,
    images, acc_n, acc_c, acc_h, acc_w, stride_n, stride_c, stride_h, stride_w,
    in_height, in_width, scaled_height, scaled_width, height, width,
    logit_step_y, logit_step_x, step_y, step_x, classes,
    FLIP: tl.constexpr, PAIR: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, y = image_and_row(height)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < width
    y0, y1, low = source(y, step_y, scaled_height)
    x0, x1, near = source(x, step_x, scaled_width)
    top0, bottom0, low0 = source(y0, logit_step_y, in_height)
    top1, bottom1, low1 = source(y1, logit_step_y, in_height)
    top0, bottom0, top1, bottom1 = top0 * stride_h, bottom0 * stride_h, top1 * stride_h, bottom1 * stride_h
    mirrored0, mirrored1 = scaled_width - 1 - x0, scaled_width - 1 - x1
    if FLIP:
        x0, x1, mirrored0, mirrored1 = mirrored0, mirrored1, x0, x1
    row0 = plane + 2 * (n * scaled_height + y0) * scaled_width
    row1 = plane + 2 * (n * scaled_height + y1) * scaled_width
    first = _columns(row0, row1, x0, x1, low, near, inside, logit_step_x, in_width, stride_w, SAME)
    second = first
    if PAIR:
        behind = 2 * tl.cast(images, tl.int64) * scaled_height * scaled_width
        second = _columns(
            row0 + behind, row1 + behind, mirrored0, mirrored1, low, near, inside, logit_step_x, in_width,
            stride_w, SAME
        )
    image = logits + n * stride_n
    other = image + images * tl.cast(stride_n, tl.int64)
    out = acc + n * acc_n + y.to(tl.int64) * acc_h + x * acc_w
    for c in range(0, classes):
        at_c = out + tl.cast(c, tl.int64) * acc_c
        sums = tl.load(at_c, mask=inside, other=0.0)
        map_c = image + tl.cast(c, tl.int64) * stride_c
        sums = _add(sums, map_c + top0, map_c + bottom0, map_c + top1, map_c + bottom1, low0, low1, first,
                    inside, SAME)
        if PAIR:
            map_c = other + tl.cast(c, tl.int64) * stride_c
            sums = _add(sums, map_c + top0, map_c + bottom0, map_c + top1, map_c + bottom1, low0, low1,
                        second, inside, SAME)
        tl.store(at_c, sums, mask=inside)


def softmax_accumulate(
    acc: Tensor, logits: Tensor, scaled_size: list[int], size: list[int], flip: bool, pair: bool
) -> None:
    """Implements the operator; see `stpp_kernels.softmax_accumulate`."""
    maps, classes, in_height, in_width = logits.shape
    images = acc.shape[0]
    (scaled_height, scaled_width), (height, width) = scaled_size, size
    if images == 0:
        return
    plane = torch.empty((maps, scaled_height, scaled_width, 2), dtype=torch.float32, device=logits.device)
    logit_step_y, logit_step_x = step(in_height, scaled_height), step(in_width, scaled_width)
    with torch.cuda.device_of(logits):
        block = block_width(scaled_width)
        _logsumexp_kernel[(maps * scaled_height, triton.cdiv(scaled_width, block))](
            logits, plane, *logits.stride(), in_height, in_width, scaled_height, scaled_width,
            logit_step_y, logit_step_x, classes, BLOCK=block, num_warps=max(1, block // 128),
        )  # fmt: skip
        block = min(256, block_width(width))
        _accumulate_kernel[(images * height, triton.cdiv(width, block))](
            acc, logits, plane, images, *acc.stride(), *logits.stride(),
            in_height, in_width, scaled_height, scaled_width, height, width,
            logit_step_y, logit_step_x, step(scaled_height, height), step(scaled_width, width), classes,
            FLIP=flip, PAIR=pair, SAME=list(scaled_size) == list(size), BLOCK=block,
            num_warps=max(1, block // 64),
        )  # fmt: skip


@triton.jit(do_not_specialize=["acc_n", "acc_c", "acc_p", "pixels", "blocks", "classes"])
def _finalize_kernel(
    acc, mask, shares, counts, acc_n, acc_c, acc_p, pixels, blocks, classes,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    pixel = tl.arange(0, BLOCK)
    inside = pixel < pixels - first
    at = acc + n * acc_n + first * acc_p + pixel * acc_p
    best = tl.load(at, mask=inside, other=1.0)
    total = best
    arg = tl.zeros([BLOCK], tl.int32)
    for c in range(1, classes):
        value = tl.load(at + tl.cast(c, tl.int64) * acc_c, mask=inside, other=0.0)
        larger = value > best
        best = tl.where(larger, value, best)
        arg = tl.where(larger, c, arg)
        total += value
    tl.store(mask + n * pixels + first + pixel, arg.to(tl.uint8), mask=inside)
    tl.store(shares + n * blocks + block, tl.sum(tl.where(inside, best / total, 0.0)))
    # Pixels past the end are counted in an extra bin after the last class. Atomic sums of integers do not
    # depend on their order.
    sums = tl.histogram(tl.where(inside, arg, classes), BINS).to(tl.int64)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + n * classes + bins, sums, mask=(bins < classes) & (sums > 0), sem="relaxed")


def finalize(acc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Implements the operator; see `stpp_kernels.softmax_accumulate`."""
    batch, classes, height, width = acc.shape
    block = 1024
    blocks = triton.cdiv(height * width, block)
    mask = torch.empty((batch, height, width), dtype=torch.uint8, device=acc.device)
    shares = torch.zeros((batch, blocks), dtype=torch.float32, device=acc.device)
    counts = torch.zeros((batch, classes), dtype=torch.int64, device=acc.device)
    if batch > 0:
        # copies only if rows are not adjacent; flat indices avoid a division per pixel
        flat_NCP = acc.flatten(2)
        with torch.cuda.device_of(acc):
            _finalize_kernel[(blocks, batch)](
                flat_NCP, mask, shares, counts, *flat_NCP.stride(), height * width, blocks, classes,
                BINS=triton.next_power_of_2(classes + 1), BLOCK=block, num_warps=8,
            )  # fmt: skip
    return mask, (shares.sum(1, dtype=torch.float64) / (height * width)).float(), counts
