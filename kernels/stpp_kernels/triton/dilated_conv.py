"""`dilated_conv3x3` on CUDA as implicit matrix products over the valid taps: forward, gradient of the input,
gradient of the weight. Derivation: ../dilated_conv.py.

Output and gradient of the input: the same taps are valid for all outputs of one of nine regions, three ranges
of rows times three of columns, cut where a tap leaves the map. A program computes a block of pixels of one
region, all images in one line, times a block of channels. Its inner dimension runs over the region's taps and
the input channels. The gradient of the input is the same product with a transposed weight and mirrored taps.

Gradient of the weight: a program computes a block of one tap's matrix. Its inner dimension runs over the
pixels for which the tap is valid.

Padding is never read, sums are float32 in registers, every result is written once, and there are no atomics:
results are bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stpp_kernels.tap_geometry import regions

SIZES = ["batch", "height", "width", "dilation"]
REGIONS = TAPS = 9
# Launch settings, not yet measured on a GPU; results differ in the last bits only. A block has ROWS pixels
# (output channels in the gradient of the weight) and COLUMNS channels, INNER channels (or pixels) lie between
# two loads, and shared memory holds blocks of both factors for each stage.
ROWS, COLUMNS, INNER = 128, 128, 64
LAUNCH = {"num_warps": 8, "num_stages": 3}
VECTOR = 16
"""Divisor of a size that Triton's compiler uses for vector loads."""


@triton.jit
def _range(part, size, dilation):
    """Returns (start, stop, first tap, last tap) of part 0, 1 or 2 of an axis, as scalars."""
    low = tl.maximum(tl.minimum(dilation, size - dilation), 0)
    high = tl.minimum(tl.maximum(dilation, size - dilation), size)
    start = tl.where(part == 0, 0, tl.where(part == 1, low, high))
    stop = tl.where(part == 0, low, tl.where(part == 1, high, size))
    central = (part == 1) & (dilation > size - dilation)  # no other tap is inside the map
    first = tl.where((part == 0) | central, 1, 0)
    last = tl.where((part == 2) | central, 1, 2)
    return start, stop, first, last


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """Adds a product; float32 is multiplied as such, not as TF32. WIDEN: in float32, for the interpreter,
    which multiplies bfloat16 as integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def _convolution_kernel(
    x, weight, out,
    x_n, x_c, x_y, x_x, weight_o, weight_i, weight_y, weight_x, out_n, out_c, out_y, out_x,
    batch, height, width, dilation,
    IN: tl.constexpr, OUT: tl.constexpr, MIRRORED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(2)
    y0, y1, first_y, last_y = _range(region // 3, height, dilation)
    x0, x1, first_x, last_x = _range(region % 3, width, dilation)
    wide, pixels = x1 - x0, batch * (y1 - y0) * (x1 - x0)
    if tl.program_id(0) * ROWS < pixels:
        pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        exists = pixel < pixels
        n = (pixel // ((y1 - y0) * wide)).to(tl.int64)
        y = y0 + pixel // wide % (y1 - y0)
        column = x0 + pixel % wide
        o = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_output = o < OUT
        i = tl.arange(0, INNER)
        sources = x + (n * x_n + y * x_y + column * x_x)[:, None] + i[None, :] * x_c
        factors = weight + o[None, :] * weight_o + i[:, None] * weight_i
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for ky in range(first_y, last_y + 1):
            for kx in range(first_x, last_x + 1):
                source = sources + ((ky - 1) * dilation) * x_y + ((kx - 1) * dilation) * x_x
                factor = factors + ((2 - ky) * weight_y + (2 - kx) * weight_x if MIRRORED else
                                    ky * weight_y + kx * weight_x)
                for start in range(0, IN, INNER):
                    inside = start + i < IN
                    a = tl.load(source + start * x_c, mask=exists[:, None] & inside[None, :], other=0.0)
                    b = tl.load(factor + start * weight_i, mask=inside[:, None] & is_output[None, :],
                                other=0.0)
                    total = _dot(a, b, total, WIDEN)
        target = out + (n * out_n + y * out_y + column * out_x)[:, None] + o[None, :] * out_c
        tl.store(target, total.to(out.dtype.element_ty), mask=exists[:, None] & is_output[None, :])


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient_kernel(
    grad, x, out,
    grad_n, grad_c, grad_y, grad_x, x_n, x_c, x_y, x_x, out_o, out_i, out_y, out_x,
    batch, height, width, dilation,
    IN: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    ky, kx = tl.program_id(2) // 3, tl.program_id(2) % 3
    down, right = (ky - 1) * dilation, (kx - 1) * dilation
    y0, x0 = tl.maximum(-down, 0), tl.maximum(-right, 0)
    high = tl.maximum(tl.minimum(height, height - down) - y0, 0)
    wide = tl.maximum(tl.minimum(width, width - right) - x0, 0)
    pixels = batch * high * wide
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_output, is_input = o < OUT, i < IN
    moved = x + down * x_y + right * x_x
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, pixels, INNER):
        pixel = start + tl.arange(0, INNER)
        exists = pixel < pixels
        n = (pixel // (high * wide)).to(tl.int64)
        y = y0 + pixel // wide % high
        column = x0 + pixel % wide
        at_grad = n * grad_n + y * grad_y + column * grad_x
        at_x = n * x_n + y * x_y + column * x_x
        a = tl.load(grad + at_grad[None, :] + o[:, None] * grad_c, mask=exists[None, :] & is_output[:, None],
                    other=0.0)
        b = tl.load(moved + at_x[:, None] + i[None, :] * x_c, mask=exists[:, None] & is_input[None, :],
                    other=0.0)
        total = _dot(a, b, total, WIDEN)
    target = out + ky * out_y + kx * out_x + o[:, None] * out_o + i[None, :] * out_i
    tl.store(target, total.to(out.dtype.element_ty), mask=is_output[:, None] & is_input[None, :])


def _is_interpreted() -> bool:
    return not isinstance(_convolution_kernel, triton.JITFunction)


def _side(most: int, size: int) -> int:
    """Side of a block: a power of two from 16, the least that tensor cores take, to `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def forward(x: Tensor, weight: Tensor, dilation: int, out: Tensor) -> None:
    """Writes the convolution into `out` [N, O, H, W]."""
    _multiply(x, weight, dilation, out, mirrored=False)


def input_gradient(grad: Tensor, weight: Tensor, dilation: int, out: Tensor) -> None:
    """Writes the gradient of the input into `out` [N, I, H, W]."""
    _multiply(grad, weight.transpose(0, 1), dilation, out, mirrored=True)


def _multiply(x: Tensor, weight: Tensor, dilation: int, out: Tensor, *, mirrored: bool) -> None:
    batch, channels_in, height, width = x.shape
    channels_out = weight.shape[0]
    if not out.numel():
        return
    high, wide = (max(stop - start for start, stop, *_ in regions(size, dilation))
                  for size in (height, width))
    pixels = batch * high * wide  # of the largest region
    # channels that no vector load fits need a mask and an address each: half the block, or registers spill
    most = COLUMNS if channels_in % VECTOR == channels_out % VECTOR == 0 else COLUMNS // 2
    rows, columns = _side(ROWS, pixels), _side(most, channels_out)
    grid = (triton.cdiv(pixels, rows), triton.cdiv(channels_out, columns), REGIONS)
    with torch.cuda.device_of(x):
        _convolution_kernel[grid](
            x, weight, out, *x.stride(), *weight.stride(), *out.stride(), batch, height, width, dilation,
            IN=channels_in, OUT=channels_out, MIRRORED=mirrored, ROWS=rows, COLUMNS=columns,
            INNER=_side(INNER, channels_in), WIDEN=_is_interpreted(), **LAUNCH,
        )  # fmt: skip


def weight_gradient(grad: Tensor, x: Tensor, dilation: int, out: Tensor) -> None:
    """Writes the gradient of the weight into `out` [O, I, 3, 3]."""
    batch, channels_in, height, width = x.shape
    channels_out = grad.shape[1]
    if not out.numel():
        return
    rows, columns = _side(ROWS, channels_out), _side(COLUMNS, channels_in)
    grid = (triton.cdiv(channels_out, rows), triton.cdiv(channels_in, columns), TAPS)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[grid](
            grad, x, out, *grad.stride(), *x.stride(), *out.stride(), batch, height, width, dilation,
            IN=channels_in, OUT=channels_out, ROWS=rows, COLUMNS=columns,
            INNER=_side(INNER, batch * height * width), WIDEN=_is_interpreted(), **LAUNCH,
        )  # fmt: skip
