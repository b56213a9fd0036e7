"""Source pixels and weights of a bilinear resize with `align_corners=True`, in the fp32 arithmetic of
PyTorch."""

import ctypes

import triton
import triton.language as tl


@triton.jit
def source(position, step_size, length):
    """Computes (first source index, second, weight of the second) of output indices `position` on an axis of
    `length` pixels."""
    at = position.to(tl.float32) * step_size
    first = tl.minimum(at.to(tl.int32), length - 1)
    second = tl.minimum(first + 1, length - 1)
    weight = tl.minimum(tl.maximum(at - first.to(tl.float32), 0.0), 1.0)
    return first, second, weight


@triton.jit
def logit(row_top, row_bottom, low, left, right, near, inside):
    """Blends one class's logit from four corners, float32: pointers to two rows, weight of the lower; offsets
    of two columns, weight of the right."""
    a = tl.load(row_top + left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row_top + right, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(row_bottom + left, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(row_bottom + right, mask=inside, other=0.0).to(tl.float32)
    return (a * (1.0 - near) + b * near) * (1.0 - low) + (d * (1.0 - near) + e * near) * low


@triton.jit
def image_and_row(height):
    """Splits the first program number into image, as int64, and row of images of `height` rows. Rows of all
    images share that axis of the grid: the others end at 65535, which a tall image exceeds."""
    number = tl.program_id(0)
    return (number // height).to(tl.int64), number % height


@triton.jit
def _low(index, cells, scale):
    return tl.minimum(tl.cast(tl.cast(index, tl.float32) * scale, tl.int32), cells - 1)


@triton.jit
def begin(cell, cells, out, scale, inverse):
    """Computes the first output that reads `cell` or a later one. The guess from the inverse scale is off by
    less than two."""
    first = tl.minimum(tl.cast(tl.cast(cell, tl.float32) * inverse, tl.int32) + 2, out)
    for _ in tl.static_range(4):
        first = tl.where((first > 0) & (_low(first - 1, cells, scale) >= cell), first - 1, first)
    first = tl.where(scale == 0.0, tl.where(cell <= 0, 0, out), first)
    return tl.where(cell >= cells, out, first)


def step(length: int, out_length: int) -> float:
    """Computes the step in source pixels between output pixels, rounded to fp32 as in PyTorch.

    The quotient of two integers below 2^24 in fp64, rounded to fp32, equals their quotient in fp32, because
    53 bits are more than twice 24.
    """
    return ctypes.c_float((length - 1) / (out_length - 1)).value if out_length > 1 else 0.0


def block_width(width: int) -> int:
    """Number of pixels per program: a power of two that wastes little of a short row."""
    return min(512, max(32, triton.next_power_of_2(width)))
