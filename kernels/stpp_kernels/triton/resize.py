"""Source pixels and weights of a bilinear resize with `align_corners=True`, in the fp32 arithmetic of PyTorch."""

import torch
import triton
import triton.language as tl


@triton.jit
def source(position, step_size, length):
    """(first source index, second, weight of the second) of output indices `position` on an axis of `length` pixels."""
    at = position.to(tl.float32) * step_size
    first = tl.minimum(at.to(tl.int32), length - 1)
    second = tl.minimum(first + 1, length - 1)
    weight = tl.minimum(tl.maximum(at - first.to(tl.float32), 0.0), 1.0)
    return first, second, weight


def step(length: int, out_length: int) -> float:
    """Source pixels from one output pixel to the next, rounded to fp32 as PyTorch does."""
    if out_length < 2:
        return 0.0
    return (torch.tensor(length - 1, dtype=torch.float32, device="cpu") / (out_length - 1)).item()


def block_width(width: int) -> int:
    """Pixels of one program: a power of two that wastes little of a short row."""
    return min(512, max(32, triton.next_power_of_2(width)))
