"""upsample_cross_entropy for CUDA: loss, count and gradient of the low-resolution logits. Derivation: ../cross_entropy.py.

A program owns a block of neighbouring cells along x and walks down a band of cell rows. Its tiles are [cells, classes] in
registers: four corners' logits, four corners' gradients. For every pixel position inside a cell, one pixel of each cell is
computed at once. The lower corners of one cell row are the upper ones of the next, so a corner row is read and written once
a band.

No atomics, hence the same bits every run, whether or not deterministic algorithms were asked for: a cell's sums for its left and
its right corners go to separate planes of a float32 workspace (2 times the logits), rows shared by two bands to a second one, and a
second kernel adds what belongs to each corner in fixed order. It also adds up the programs' losses and counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels import reference
from stpp_kernels.triton.resize import step

TILE = 512  # elements of a [cells, classes] tile: with 4 warps about 150 registers a thread (1024 would take all 255)
BAND = 4  # cell rows of a band, at least
PROGRAMS = 2048  # enough to fill the largest GPU; beyond, bands grow
FAR_BELOW = tl.constexpr(-1e30)  # logit of the classes that fill a tile up to a power of two


@triton.jit
def _low(index, cells, scale):
    return tl.minimum(tl.cast(tl.cast(index, tl.float32) * scale, tl.int32), cells - 1)


@triton.jit
def _begin(cell, cells, out, scale, inverse):
    """First output that reads `cell` or a later one. The guess from the inverse scale is off by less than two."""
    first = tl.minimum(tl.cast(tl.cast(cell, tl.float32) * inverse, tl.int32) + 2, out)
    for _ in range(4):
        first = tl.where((first > 0) & (_low(first - 1, cells, scale) >= cell), first - 1, first)
    first = tl.where(scale == 0.0, tl.where(cell <= 0, 0, out), first)
    return tl.where(cell >= cells, out, first)


@triton.jit
def _corner(base, row, column, stride_y, columns, stride_x, classes, stride_c, ok):
    at = base + row * stride_y + (column * stride_x)[:, None] + (classes * stride_c)[None, :]
    inside = (column < columns)[:, None] & ok
    return tl.where(ok, tl.load(at, mask=inside, other=0.0).to(tl.float32), FAR_BELOW)


@triton.jit
def _forward(
    logits, labels, class_weight, pixel_weight, work, shared, partial_loss, partial_count, partial_bad,
    h, w, height, width, scale_y, scale_x, inverse_y, inverse_x, ignore_index,
    stride_n, stride_c, stride_y, stride_x, work_plane, work_n, work_c, work_y, work_x, cells_per_band, bands,
    C: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr, HAS_PIXEL_WEIGHT: tl.constexpr, WITH_GRADIENT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cells_x, cells_y = tl.maximum(w - 1, 1), tl.maximum(h - 1, 1)
    blocks = tl.cdiv(cells_x, CELLS)
    n = (program // (blocks * bands)).to(tl.int64)
    band = (program // blocks) % bands
    x = (program % blocks) * CELLS + tl.arange(0, CELLS)
    c = tl.arange(0, CLASSES)
    is_class = (c < C)[None, :]
    begin_x = _begin(x, cells_x, width, scale_x, inverse_x)
    count_x = tl.where(x < cells_x, _begin(x + 1, cells_x, width, scale_x, inverse_x) - begin_x, 0)
    most_x = tl.max(count_x, 0)
    base = logits + n * stride_n
    y_first = band * cells_per_band
    y_last = tl.minimum(y_first + cells_per_band, cells_y)

    upper_left = _corner(base, y_first, x, stride_y, w, stride_x, c, stride_c, is_class)
    upper_right = _corner(base, y_first, tl.minimum(x + 1, w - 1), stride_y, w, stride_x, c, stride_c, is_class)
    grad_upper_left = tl.zeros([CELLS, CLASSES], tl.float32)
    grad_upper_right = tl.zeros([CELLS, CLASSES], tl.float32)
    loss = tl.zeros([CELLS], tl.float32)
    counted = tl.zeros([CELLS], tl.int32)
    bad = tl.zeros([CELLS], tl.int32)
    out = (x * work_x)[:, None] + (c * work_c)[None, :]
    writes = (x < cells_x)[:, None] & is_class

    for y in range(y_first, y_last):
        below = tl.minimum(y + 1, h - 1)
        lower_left = _corner(base, below, x, stride_y, w, stride_x, c, stride_c, is_class)
        lower_right = _corner(base, below, tl.minimum(x + 1, w - 1), stride_y, w, stride_x, c, stride_c, is_class)
        grad_lower_left = tl.zeros([CELLS, CLASSES], tl.float32)
        grad_lower_right = tl.zeros([CELLS, CLASSES], tl.float32)
        begin_y = _begin(y, cells_y, height, scale_y, inverse_y)
        end_y = _begin(y + 1, cells_y, height, scale_y, inverse_y)
        for i in range(begin_y, end_y):
            down = tl.minimum(tl.cast(i, tl.float32) * scale_y - tl.cast(y, tl.float32), 1.0)
            left = (1.0 - down) * upper_left + down * lower_left
            right = (1.0 - down) * upper_right + down * lower_right
            grad_left = tl.zeros([CELLS, CLASSES], tl.float32)
            grad_right = tl.zeros([CELLS, CLASSES], tl.float32)
            for j in range(0, most_x):
                pixel = begin_x + j
                exists = j < count_x
                across = tl.minimum(pixel.to(tl.float32) * scale_x - x.to(tl.float32), 1.0)
                at = (n * height + i) * width + pixel
                label = tl.load(labels + at, mask=exists, other=0).to(tl.int64)
                counts = exists & (label != ignore_index)
                inside = (label >= 0) & (label < C)
                bad += (counts & ~inside).to(tl.int32)
                counts = counts & inside
                counted += counts.to(tl.int32)
                weight = counts.to(tl.float32)
                if HAS_CLASS_WEIGHT:
                    weight *= tl.load(class_weight + label, mask=counts, other=0.0)
                if HAS_PIXEL_WEIGHT:
                    weight *= tl.load(pixel_weight + at, mask=counts, other=0.0)
                z = (1.0 - across)[:, None] * left + across[:, None] * right
                top = tl.max(z, 1)
                prob = tl.exp(z - top[:, None])
                total = tl.sum(prob, 1)
                is_label = c[None, :] == label.to(tl.int32)[:, None]
                own = tl.sum(tl.where(is_label, z, 0.0), 1)
                loss += tl.where(counts, weight * (tl.log(total) + (top - own)), 0.0)
                if WITH_GRADIENT:
                    grad = prob * (weight / total)[:, None] - tl.where(is_label, weight[:, None], 0.0)
                    grad_left += grad * (1.0 - across)[:, None]
                    grad_right += grad * across[:, None]
            if WITH_GRADIENT:
                grad_upper_left += (1.0 - down) * grad_left
                grad_upper_right += (1.0 - down) * grad_right
                grad_lower_left += down * grad_left
                grad_lower_right += down * grad_right
        if WITH_GRADIENT:
            row = work + n * work_n + y * work_y + out
            tl.store(row, grad_upper_left, mask=writes)
            tl.store(row + work_plane, grad_upper_right, mask=writes)
        upper_left, upper_right = lower_left, lower_right
        grad_upper_left, grad_upper_right = grad_lower_left, grad_lower_right

    if WITH_GRADIENT:  # [n, band, left or right, C, w]: the corner row below the band
        row = shared + (n * bands + band) * 2 * C * w + x[:, None] + (c * w)[None, :]
        tl.store(row, grad_upper_left, mask=writes)
        tl.store(row + C * w, grad_upper_right, mask=writes)
    tl.store(partial_loss + program, tl.sum(loss, 0))
    tl.store(partial_count + program, tl.sum(counted, 0))
    tl.store(partial_bad + program, tl.sum(bad, 0))


@triton.jit
def _finish(
    work, shared, gradient, partial_loss, partial_count, partial_bad, loss, counted, valid, programs,
    h, w, work_plane, work_n, work_c, work_y, work_x, grad_n, grad_c, grad_y, grad_x, cells_per_band, bands,
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
        total = tl.zeros([BLOCK], tl.float32)
        if y < cells_y:
            at = work + n * work_n + y * work_y + c * work_c + x * work_x
            total += tl.load(at, mask=is_left, other=0.0)
            total += tl.load(at + work_plane - work_x, mask=is_right, other=0.0)
        if (y > 0) & ((y == cells_y) | (y % cells_per_band == 0)):  # the row below a band: the last one, or the one above y's
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.upsample_cross_entropy, for float32, bfloat16 and float16; no host sync."""
    num_images, num_classes, h, w = logits.shape
    height, width = labels.shape[1:]
    cells_y, cells_x = max(h - 1, 1), max(w - 1, 1)
    classes = triton.next_power_of_2(num_classes)
    cells = max(1, min(TILE // classes, 64, triton.next_power_of_2(cells_x)))
    blocks = triton.cdiv(cells_x, cells)
    cells_per_band = max(BAND, cells_y * num_images * blocks // PROGRAMS)
    bands = triton.cdiv(cells_y, cells_per_band)
    programs = num_images * bands * blocks

    device = logits.device
    loss, counted, valid = (torch.zeros((), dtype=t, device=device) for t in (torch.float32, torch.int64, torch.int8))
    gradient_dtype = reference.gradient_dtype(logits.dtype)
    gradient = torch.empty_like(logits, dtype=gradient_dtype) if with_gradient else logits.new_empty(0, dtype=gradient_dtype)
    if logits.numel() == 0 or labels.numel() == 0:
        return loss, counted, gradient.zero_()
    partials = [torch.empty(programs, dtype=t, device=device) for t in (torch.float32, torch.int32, torch.int32)]
    work, shared, work_strides = loss, loss, (0,) * 5
    if with_gradient:
        channels_last = logits.stride(1) == 1 and num_classes > 1
        shape = (2, num_images, h, w, num_classes) if channels_last else (2, num_images, num_classes, h, w)
        work = torch.empty(shape, device=device)
        work_strides = (work.permute(0, 1, 4, 2, 3) if channels_last else work).stride()
        shared = torch.empty((num_images, bands, 2, num_classes, w), device=device)

    scale_y, scale_x = step(h, height), step(w, width)
    with torch.cuda.device_of(logits):
        _forward[(programs,)](
            logits, labels.contiguous(), _weights(class_weight, logits), _weights(pixel_weight, logits), work, shared, *partials,
            h, w, height, width, scale_y, scale_x, 1 / scale_y if scale_y else 0.0, 1 / scale_x if scale_x else 0.0,
            ignore_index, *logits.stride(), *work_strides, cells_per_band, bands,
            C=num_classes, CELLS=cells, CLASSES=classes, HAS_CLASS_WEIGHT=class_weight is not None,
            HAS_PIXEL_WEIGHT=pixel_weight is not None, WITH_GRADIENT=with_gradient, num_warps=4,
        )  # fmt: skip
        block = 512
        grid = (num_images * h, triton.cdiv(num_classes * w, block)) if with_gradient else (1, 1)
        grad_strides = gradient.stride() if with_gradient else (0, 0, 0, 0)
        _finish[grid](
            work, shared, gradient, *partials, loss, counted, valid, programs, h, w, *work_strides, *grad_strides,
            cells_per_band, bands, C=num_classes, CHANNELS_LAST=logits.stride(1) == 1, WITH_GRADIENT=with_gradient,
            BLOCK=block, num_warps=4,
        )  # fmt: skip
    torch._assert_async(valid, f"a label lies outside [0, {num_classes}) and is not the ignore index {ignore_index}")
    return loss, counted, gradient


def _weights(weight: Tensor | None, logits: Tensor) -> Tensor:
    return logits if weight is None else weight.to(torch.float32).contiguous()
