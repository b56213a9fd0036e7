"""Fused convolutions of a folded network on CUDA: bias, ReLU and shortcut in the convolution's own pass, and
1x1 convolutions as matrix products.

PyTorch computes bias, shortcut and ReLU of a folded block in passes of their own over its maps. cuDNN adds
them to the results of a convolution before it writes them, and so does cuBLASLt for a matrix product, which
also needs no search of an algorithm for every new size of image. The 7x7 stem stays as it is: it was reported
to be 17 times as slow fused (PyTorch issue 68506).

Off unless STPP_FUSED_CONV=1, because it has not been measured on a GPU; on a CPU the same code composes plain
operators.
"""

import os
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpp.models.resnet import BasicBlock, Bottleneck

VARIABLE = "STPP_FUSED_CONV"
"""Environment variable that fuses the eager networks of labelling on CUDA."""


def requested(device: torch.device) -> bool:
    """Tells whether labelling networks on `device` are to be fused."""
    return device.type == "cuda" and os.environ.get(VARIABLE) == "1"


def fuse(network: nn.Module) -> nn.Module:
    """Fuses a network from `fold.ready`, in place: residual blocks, and sequences of convolution and ReLU.
    Parameters and their names stay."""
    for module in list(network.modules()):
        if isinstance(module, Bottleneck):
            module.forward = MethodType(_bottleneck, module)
        elif isinstance(module, BasicBlock):
            module.forward = MethodType(_basic_block, module)
        elif isinstance(module, nn.Sequential):
            _fuse_sequence(module)
    return network


def conv_relu(conv: nn.Conv2d, x_NCHW: Tensor, shortcut_NCHW: Tensor | None = None) -> Tensor:
    """Computes relu(conv(x) + shortcut) in one pass on CUDA; the shortcut has the shape of the result."""
    weight, bias, settings = conv.weight, conv.bias, (conv.stride, conv.padding, conv.dilation, conv.groups)
    if shortcut_NCHW is None and conv.kernel_size == conv.stride == (1, 1):
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        out_PO = torch._addmm_activation(bias, x_NHWC.flatten(0, 2), weight.flatten(1).t())
        return out_PO.unflatten(0, x_NHWC.shape[:3]).permute(0, 3, 1, 2)
    if not x_NCHW.is_cuda:
        out_NCHW = F.conv2d(x_NCHW, weight, bias, *settings)
        return (out_NCHW if shortcut_NCHW is None else out_NCHW.add_(shortcut_NCHW)).relu_()
    if shortcut_NCHW is None:
        return torch.cudnn_convolution_relu(x_NCHW, weight, bias, *settings)
    return torch.cudnn_convolution_add_relu(x_NCHW, weight, shortcut_NCHW, 1.0, bias, *settings)


def _bottleneck(block: Bottleneck, x_NCHW: Tensor) -> Tensor:
    out_NCHW = conv_relu(block.conv2, conv_relu(block.conv1, x_NCHW))
    return conv_relu(block.conv3, out_NCHW, _shortcut(block, x_NCHW))


def _basic_block(block: BasicBlock, x_NCHW: Tensor) -> Tensor:
    return conv_relu(block.conv2, conv_relu(block.conv1, x_NCHW), _shortcut(block, x_NCHW))


def _shortcut(block: nn.Module, x_NCHW: Tensor) -> Tensor:
    return x_NCHW if block.downsample is None else block.downsample(x_NCHW)


def _fuse_sequence(sequence: nn.Sequential) -> None:
    """Moves each ReLU into the convolution before it; the identity of a folded batch norm lies between."""
    for i, (conv, norm, relu) in enumerate(zip(sequence, sequence[1:], sequence[2:], strict=False)):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.Identity) and isinstance(relu, nn.ReLU):
            conv.forward = MethodType(conv_relu, conv)
            sequence[i + 2] = nn.Identity()
