"""A dilated 3x3 convolution that multiplies no padding."""

import torch
from torch import Tensor

from stpp_kernels import dispatch, reference


def _fake(x, weight, dilation):
    like = x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return like.to(memory_format=torch.channels_last)


def _fake_backward(grad, x, weight, dilation, need_x, need_weight):
    empty = x.new_empty(0)
    return torch.empty_like(x) if need_x else empty, torch.empty_like(weight) if need_weight else empty


_op = dispatch.define(
    "dilated_conv3x3", "(Tensor x, Tensor weight, int dilation) -> Tensor",
    reference=reference.dilated_conv3x3, fake=_fake,
    cpp=False,
)  # fmt: skip


def dilated_conv3x3(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    return torch.ops.stpp_kernels.dilated_conv3x3(x_NIHW, weight_OI33, dilation)
