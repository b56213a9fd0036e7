"""`upsample_cross_entropy` on CUDA: loss, count and gradient of the low-resolution logits. Derivation:
../cross_entropy.py.

A program processes a block of neighbouring cells along x, down a band of cell rows. Its tiles are
[classes, cells] in registers: four corners' logits, four corners' gradients. For every pixel position inside
a cell, one pixel of each cell is computed in parallel. The lower corners of one cell row are the upper ones
of the next, so a corner row is read and written once per band.

Layout. Logits and workspace are [N, C, h, w], so that cells are adjacent in memory, and values per cell are
[1, cells]. Triton then gives tiles and vectors one layout, lanes over the cells first, the remaining ones
over groups of classes: for 21 classes and 256 elements of one warp, 8 cells x 4 lanes of 8 classes each. A
sum over the classes is 7 additions and 2 shuffles for 8 pixels, no layout is converted, and one warp needs no
barrier. Logits in channels_last are copied first: a few microseconds, whereas lanes over the classes would
cost five shuffles per pixel and a barrier wherever a vector meets a tile.

Shift of the exponentials. Softmax may subtract any number; the largest logit of a pixel p would take a
reduction per pixel. Let m_k = max_c x_k[c] be the largest logit of corner k, computed once per cell. The
bound b_p = sum_k w_pk m_k >= max_c z_p[c] needs none. With the shortfalls d_k[c] = m_k - x_k[c] >= 0 it
exceeds the largest logit by

    b_p - max_c z_p[c] = min_c sum_k w_pk d_k[c] <= min_c max_k d_k[c] = G,

one number per cell, 0 if one class is the largest at all four corners. It is large if corners disagree
strongly: with (1e4, -1e4) and (-1e4, 1e4) the middle has z = (0, 0) and b = 1e4, and all exponentials would
be 0. So if G exceeds MAX_GAP = 44 in any cell of the program's row, the largest logits are searched. Below
it the largest exponential is at least e^-44 > 2^-64, those that underflow (below 2^-126) are less than 2^-62
of it, and 1 / total is finite. The subtraction then rounds to 2^-24 of at most 44 nats, which are a part of
the corners' spread; their interpolation has the same rounding error. Rounding may also put b below a logit by
a few units in the last place of the largest corner, which is less than 1 nat up to MAX_BOUND = 2^20; beyond,
and for NaN, the logits are searched too.

There are no atomics, hence the result is bitwise reproducible, with or without deterministic algorithms: a
cell's sums for its left and its right corners go to separate planes of a float32 workspace (2 times the
logits), rows shared by two bands to a second one, and a second kernel adds the parts of each corner in fixed
order. It also sums the programs' losses and counts.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.triton.resize import begin, step


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch settings of the forward kernel; results differ in the last bits only. The defaults follow from
    register use (benchmarks/NOTES.md) and are not yet measured on a GPU."""

    tile: int = 256
    """Elements of a [classes, cells] tile: classes, padded to a power of two, times cells of a program, from
    1 to 64."""
    warps: int = 1
    """Warps per program. `tile / (32 * warps)` elements per thread: 8 take 95 to 230 registers, 16 all of
    them. Two or more warps split the classes if a warp has fewer than 32 cells; reductions then use shared
    memory."""
    programs: int = 4096
    """Number of programs above which bands have more than one row of cells. A band reads and writes its
    border rows twice."""


FAR_BELOW = tl.constexpr(-1e30)  # logit of the classes that pad a tile to a power of two
MAX_GAP = tl.constexpr(44.0)  # nats; see above
MAX_BOUND = tl.constexpr(2.0**20)
MAX_ELEMENTS = 2**31 - 1  # of an image's logits: offsets within an image are 32-bit
# One compiled variant for all sizes: specialising would not help, as none of them is a stride.
SIZES = ["images", "h", "w", "height", "width", "ignore_index", "programs", "cells_per_band", "bands"]
GRADIENT_STRIDES = ["grad_n", "grad_c", "grad_y", "grad_x"]


@triton.jit
def _corner(tile, exists, is_class):
    """Loads (logits [classes, cells] of one corner of every cell, the largest of each cell [1, cells])."""
    logits = tl.where(is_class, tl.load(tile, mask=exists & is_class, other=0.0).to(tl.float32), FAR_BELOW)
    return logits, tl.max(logits, 0, keep_dims=True)


@triton.jit
def _blend(near, a, b):
    return (1.0 - near) * a + near * b


@triton.jit
def _bound_fails(ul, ur, ll, lr, top_ul, top_ur, top_ll, top_lr):
    """Returns a scalar: True if a pixel of these cells may lie too far below the bound for accurate
    exponentials."""
    above = tl.maximum(tl.maximum(top_ul - ul, top_ur - ur), tl.maximum(top_ll - ll, top_lr - lr))
    gap = tl.min(above, 0, keep_dims=True)
    largest = tl.maximum(tl.maximum(tl.abs(top_ul), tl.abs(top_ur)),
                         tl.maximum(tl.abs(top_ll), tl.abs(top_lr)))
    holds = (gap <= MAX_GAP) & (largest <= MAX_BOUND)  # false for NaN
    return tl.min(holds.to(tl.int32)) == 0


@triton.jit(do_not_specialize=[name for name in SIZES if name != "programs"])
def _forward(
    logits, labels, class_weight, pixel_weight, work, shared, partial_loss, partial_count, partial_bad,
    images, h, w, height, width, scale_y, scale_x, inverse_y, inverse_x, ignore_index,
    cells_per_band, bands,
    C: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_PIXEL_WEIGHT: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cells_x, cells_y = tl.maximum(w - 1, 1), tl.maximum(h - 1, 1)
    blocks = tl.cdiv(cells_x, CELLS)
    n = (program // (blocks * bands)).to(tl.int64)
    band = (program // blocks) % bands
    x = (program % blocks) * CELLS + tl.arange(0, CELLS)[None, :]
    c = tl.arange(0, CLASSES)[:, None]
    is_class = c < C
    begin_x = begin(x, cells_x, width, scale_x, inverse_x)
    count_x = tl.where(x < cells_x, begin(x + 1, cells_x, width, scale_x, inverse_x) - begin_x, 0)
    most_x = tl.max(count_x)
    has_left, has_right = x < w, x + 1 < w  # a map of one column has no right corners; their weight is zero
    plane = h * w
    base = logits + n * C * plane
    work_left = work + n * C * plane
    work_right = work_left + tl.cast(images, tl.int64) * C * plane
    tile = c * plane + x  # below 2^31, as upsample_cross_entropy checks
    y_first = band * cells_per_band
    y_last = tl.minimum(y_first + cells_per_band, cells_y)

    ul, top_ul = _corner(base + y_first * w + tile, has_left, is_class)
    ur, top_ur = _corner(base + y_first * w + 1 + tile, has_right, is_class)
    grad_ul = tl.zeros([CLASSES, CELLS], tl.float32)
    grad_ur = tl.zeros([CLASSES, CELLS], tl.float32)
    loss = tl.zeros([1, CELLS], tl.float32)
    counted = tl.zeros([1, CELLS], tl.int32)
    bad = tl.zeros([1, CELLS], tl.int32)
    writes = (x < cells_x) & is_class

    for y in range(y_first, y_last):
        upper, lower = y * w, tl.minimum(y + 1, h - 1) * w
        ll, top_ll = _corner(base + lower + tile, has_left, is_class)
        lr, top_lr = _corner(base + lower + 1 + tile, has_right, is_class)
        search = _bound_fails(ul, ur, ll, lr, top_ul, top_ur, top_ll, top_lr)
        grad_ll = tl.zeros([CLASSES, CELLS], tl.float32)
        grad_lr = tl.zeros([CLASSES, CELLS], tl.float32)
        begin_y = begin(y, cells_y, height, scale_y, inverse_y)
        end_y = begin(y + 1, cells_y, height, scale_y, inverse_y)
        for i in range(begin_y, end_y):
            down = tl.minimum(tl.cast(i, tl.float32) * scale_y - tl.cast(y, tl.float32), 1.0)
            left, right = _blend(down, ul, ll), _blend(down, ur, lr)
            top_left, top_right = _blend(down, top_ul, top_ll), _blend(down, top_ur, top_lr)
            grad_left = tl.zeros([CLASSES, CELLS], tl.float32)
            grad_right = tl.zeros([CLASSES, CELLS], tl.float32)
            row = (n * height + i) * width
            for j in range(0, most_x):
                pixel = begin_x + j
                exists = j < count_x
                # Clamped for cells without this pixel: outside the cell the bound does not hold, and inf * 0
                # would be NaN.
                across = tl.maximum(tl.minimum(pixel.to(tl.float32) * scale_x - x.to(tl.float32), 1.0), 0.0)
                label = tl.load(labels + row + pixel, mask=exists, other=0).to(tl.int64)
                counts = exists & (label != ignore_index)
                inside = (label >= 0) & (label < C)
                bad += (counts & ~inside).to(tl.int32)
                counts = counts & inside
                label = label.to(tl.int32)
                counted += counts.to(tl.int32)
                weight = counts.to(tl.float32)
                if HAS_CLASS_WEIGHT:
                    weight *= tl.load(class_weight + label, mask=counts, other=0.0)
                if HAS_PIXEL_WEIGHT:
                    weight *= tl.load(pixel_weight + row + pixel, mask=counts, other=0.0)
                # The label's logit from its four corners: selecting it by a sum over the classes costs more.
                own = label * plane + x
                own_ul = tl.load(base + upper + own, mask=counts, other=0.0).to(tl.float32)
                own_ll = tl.load(base + lower + own, mask=counts, other=0.0).to(tl.float32)
                own_ur = tl.load(base + upper + 1 + own, mask=counts & has_right, other=0.0).to(tl.float32)
                own_lr = tl.load(base + lower + 1 + own, mask=counts & has_right, other=0.0).to(tl.float32)
                own_z = _blend(across, _blend(down, own_ul, own_ll), _blend(down, own_ur, own_lr))
                z = _blend(across, left, right)
                top = _blend(across, top_left, top_right)
                if search:
                    top = tl.max(z, 0, keep_dims=True)
                prob = tl.exp(z - top)
                total = tl.sum(prob, 0, keep_dims=True)
                loss += tl.where(counts, weight * (tl.log(total) + (top - own_z)), 0.0)
                if WITH_GRADIENT:
                    grad = prob * (weight / total) - tl.where(c == label, weight, 0.0)
                    grad_left += grad * (1.0 - across)
                    grad_right += grad * across
            if WITH_GRADIENT:
                grad_ul += (1.0 - down) * grad_left
                grad_ur += (1.0 - down) * grad_right
                grad_ll += down * grad_left
                grad_lr += down * grad_right
        if WITH_GRADIENT:
            tl.store(work_left + upper + tile, grad_ul, mask=writes)
            tl.store(work_right + upper + tile, grad_ur, mask=writes)
        ul, ur, top_ul, top_ur = ll, lr, top_ll, top_lr
        grad_ul, grad_ur = grad_ll, grad_lr

    if WITH_GRADIENT:  # [n, band, left or right, C, w]: the corner row below the band
        row = shared + (n * bands + band) * 2 * C * w + x + c * w
        tl.store(row, grad_ul, mask=writes)
        tl.store(row + C * w, grad_ur, mask=writes)
    tl.store(partial_loss + program, tl.sum(loss))
    tl.store(partial_count + program, tl.sum(counted))
    tl.store(partial_bad + program, tl.sum(bad))


@triton.jit(do_not_specialize=[*SIZES, *GRADIENT_STRIDES])
def _finish(
    work, shared, gradient, partial_loss, partial_count, partial_bad, loss, counted, valid, programs,
    images, h, w, grad_n, grad_c, grad_y, grad_x, cells_per_band, bands,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        losses = tl.zeros([BLOCK], tl.float64)
        counts = tl.zeros([BLOCK], tl.int64)
        bads = tl.zeros([BLOCK], tl.int32)
        for start in range(0, programs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            losses += tl.load(partial_loss + at, mask=at < programs, other=0.0).to(tl.float64)
            counts += tl.load(partial_count + at, mask=at < programs, other=0).to(tl.int64)
            bads += tl.load(partial_bad + at, mask=at < programs, other=0)
        tl.store(loss, tl.sum(losses, 0).to(tl.float32))
        tl.store(counted, tl.sum(counts, 0))
        tl.store(valid, (tl.sum(bads, 0) == 0).to(tl.int8))
    if WITH_GRADIENT:
        n, y = (tl.program_id(0) // h).to(tl.int64), tl.program_id(0) % h
        index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = index // C if CHANNELS_LAST else index % w
        c = index % C if CHANNELS_LAST else index // w
        exists = index < C * w
        cells_x, cells_y = tl.maximum(w - 1, 1), tl.maximum(h - 1, 1)
        is_left, is_right = exists & (x < cells_x), exists & (x > 0)
        plane = h * w
        total = tl.zeros([BLOCK], tl.float32)
        if y < cells_y:
            at = work + n * C * plane + (c * plane + y * w + x)
            total += tl.load(at, mask=is_left, other=0.0)
            total += tl.load(at + tl.cast(images, tl.int64) * C * plane - 1, mask=is_right, other=0.0)
        # the row below a band: the last one, or the one above y's
        if (y > 0) & ((y == cells_y) | (y % cells_per_band == 0)):
            band = (y - 1) // cells_per_band
            at = shared + (n * bands + band) * 2 * C * w + c * w + x
            total += tl.load(at, mask=is_left, other=0.0)
            total += tl.load(at + C * w - 1, mask=is_right, other=0.0)
        tl.store(gradient + n * grad_n + y * grad_y + c * grad_c + x * grad_x, total, mask=exists)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    with_gradient: bool,
    launch: Launch = Launch(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements reference.upsample_cross_entropy for float32, bfloat16 and float16, without host syncs.

    Args:
        launch: settings of the forward kernel, for benchmarks; the operator uses the defaults.

    Raises:
        ValueError: an image with 2^31 or more low-resolution logits.
    """
    num_images, num_classes, h, w = logits.shape
    height, width = labels.shape[1:]
    cells_y, cells_x = max(h - 1, 1), max(w - 1, 1)
    classes = triton.next_power_of_2(num_classes)
    cells = max(1, min(launch.tile // classes, 64, triton.next_power_of_2(cells_x)))
    blocks = triton.cdiv(cells_x, cells)
    cells_per_band = max(1, cells_y * num_images * blocks // launch.programs)
    bands = triton.cdiv(cells_y, cells_per_band)
    programs = num_images * bands * blocks

    device = logits.device
    loss, counted, valid = (torch.empty((), dtype=t, device=device)
                            for t in (torch.float32, torch.int64, torch.int8))
    gradient_dtype = reference.gradient_dtype(logits.dtype)
    gradient = (
        torch.empty_like(logits, dtype=gradient_dtype)
        if with_gradient
        else logits.new_empty(0, dtype=gradient_dtype)
    )
    if logits.numel() == 0 or labels.numel() == 0:
        return loss.zero_(), counted.zero_(), gradient.zero_()
    if num_classes * h * w > MAX_ELEMENTS:
        raise ValueError(f"logits have {num_classes * h * w} elements per image; on CUDA at most "
                         f"{MAX_ELEMENTS} are supported")
    partials = [torch.empty(programs, dtype=t, device=device)
                for t in (torch.float32, torch.int32, torch.int32)]
    work = shared = loss
    if with_gradient:
        work = torch.empty((2, num_images, num_classes, h, w), device=device)
        shared = torch.empty((num_images, bands, 2, num_classes, w), device=device)

    scale_y, scale_x = step(h, height), step(w, width)
    with torch.cuda.device_of(logits):
        _forward[(programs,)](
            logits.contiguous(), labels.contiguous(), _weights(class_weight, logits),
            _weights(pixel_weight, logits), work, shared, *partials, num_images, h, w, height, width,
            scale_y, scale_x, 1 / scale_y if scale_y else 0.0, 1 / scale_x if scale_x else 0.0,
            ignore_index, cells_per_band, bands,
            C=num_classes, CELLS=cells, CLASSES=classes, HAS_CLASS_WEIGHT=class_weight is not None,
            HAS_PIXEL_WEIGHT=pixel_weight is not None, WITH_GRADIENT=with_gradient, num_warps=launch.warps,
            maxnreg=255 if classes == 256 else None,  # or ptxas spills registers to fit more programs
        )  # fmt: skip
        block = 512
        grid = (num_images * h, triton.cdiv(num_classes * w, block)) if with_gradient else (1, 1)
        grad_strides = gradient.stride() if with_gradient else (0, 0, 0, 0)
        _finish[grid](
            work, shared, gradient, *partials, loss, counted, valid, programs, num_images, h, w,
            *grad_strides, cells_per_band, bands, C=num_classes, CHANNELS_LAST=logits.stride(1) == 1,
            WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=4,
        )  # fmt: skip
    torch._assert_async(valid, f"a label lies outside [0, {num_classes}) and is not the ignore index "
                               f"{ignore_index}")
    return loss, counted, gradient


def _weights(weight: Tensor | None, logits: Tensor) -> Tensor:
    return logits if weight is None else weight.to(torch.float32).contiguous()
