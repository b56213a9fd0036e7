"""FLOP counter of networks: PyTorch's counter, extended by the convolutions of this package."""

from typing import TYPE_CHECKING

import torch

from stpp_kernels import depthwise_conv, dilated_conv  # noqa: F401  defines the operators

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def counter() -> "FlopCounterMode":
    """Makes a context that counts FLOPs, two per multiply-add; `get_total_flops()` returns the sum.

    It counts matrix products, attention and convolutions as if nothing were skipped, including the taps in
    padding that `dilated_conv3x3` skips. On the meta device it counts without computing.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    formulas = {
        torch.ops.aten.convolution_backward: _convolution_backward,
        torch.ops.stpp_kernels.depthwise_conv: _depthwise_conv,
        torch.ops.stpp_kernels.depthwise_conv_backward: _depthwise_conv_backward,
        torch.ops.stpp_kernels.dilated_conv3x3: _dilated_conv3x3,
        torch.ops.stpp_kernels.dilated_conv3x3_backward: _dilated_conv3x3_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _dilated_conv3x3(x_shape: torch.Size, weight_shape: torch.Size, dilation: int, **_) -> int:
    images, _, height, width = x_shape
    return 2 * images * height * width * weight_shape.numel()


def _dilated_conv3x3_backward(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, dilation: int,
    need_x: bool, need_weight: bool, **_,
) -> int:
    return (need_x + need_weight) * _dilated_conv3x3(x_shape, weight_shape, dilation)


def _convolution_backward(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, bias, stride, padding, dilation,
    transposed: bool, output_padding, groups: int, output_mask: list[bool], **_,
) -> int:
    """Corrects PyTorch's formula, which ignores groups in a weight gradient and counts C times too many."""
    positions = x_shape if transposed else grad_shape
    return sum(output_mask[:2]) * 2 * positions.numel() * weight_shape[1:].numel()


def _depthwise_conv(
    x_shape: torch.Size, weight_shape: torch.Size, *_geometry, out_shape: torch.Size, **_
) -> int:
    return 2 * out_shape.numel() * weight_shape[2:].numel()


def _depthwise_conv_backward(
    grad_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, stride: int, dilation: int,
    padding: list[int], need_x: bool, need_weight: bool, **_,
) -> int:
    return (need_x + need_weight) * 2 * grad_shape.numel() * weight_shape[2:].numel()
