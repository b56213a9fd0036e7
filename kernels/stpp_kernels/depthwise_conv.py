"""Operator `depthwise_conv`: depthwise convolution with a backward pass in C++.

With stride s, dilation d, and top rows and left columns of padding, output (i, j) of a channel is

    out[i, j] = sum over ky, kx of W[ky, kx] in[s i - top + d ky, s j - left + d kx],
    in = 0 outside the map.

The gradients are sums of the same products, gathered by destination:

    din[y, x]  = sum over ky, kx of W[ky, kx] dout[(y + top - d ky) / s, (x + left - d kx) / s],
                 where s divides both, dout = 0 outside the map;
    dW[ky, kx] = sum over images, i, j of dout[i, j] in[s i - top + d ky, s j - left + d kx].

Channels are independent, so in channels_last both multiply and add whole vectors of channels, k^2 times for
each value read. oneDNN's backward pass does so only for the 3x3 kernel with stride and dilation 1; all others
take many times as long (benchmarks/NOTES.md). The C++ form covers all odd kernels, strides, dilations and
paddings. The forward pass is PyTorch's, and on CUDA so are the gradients.

Shape suffixes: N images, C channels, H W rows and columns, K side of the kernel.
"""

import torch
from torch import Tensor

from stpp_kernels import dispatch, reference

Padding = tuple[int, int, int, int]
"""Zero columns on the left and right, zero rows above and below, in the order of `F.pad`."""


def depthwise_conv(
    x_NCHW: Tensor,
    weight_C1KK: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = (0, 0, 0, 0),
) -> Tensor:
    """Computes `F.conv2d(F.pad(x, padding), weight, None, stride, 0, dilation, C)`, with faster gradients on
    a CPU.

    Under autocast both arguments are cast to its dtype, as in `F.conv2d`. Gradients are bitwise reproducible
    for any number of threads. It is one opaque operator for `torch.compile` on a CPU; a plain convolution on
    CUDA and for `torch.export`. First derivatives only.

    Args:
        x_NCHW: [N, C, H, W] floating point, any strides; channels_last is read without a copy.
        weight_C1KK: [C, 1, K, K], K odd, the dtype of x (or autocast).
        stride, dilation: of both axes, at least 1.
        padding: zeros (left, right, above, below), each at least 0.

    Returns:
        [N, C, rows, columns], channels_last, the dtype of x.

    Raises:
        ValueError: shapes that do not fit, a kernel larger than the padded map, different dtypes outside
            autocast, a stride, dilation or padding out of range.
    """
    device = x_NCHW.device.type
    if torch.is_autocast_enabled(device) and x_NCHW.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x_NCHW, weight_C1KK = x_NCHW.to(dtype), weight_C1KK.to(dtype)
    _check(x_NCHW, weight_C1KK, stride, dilation, padding)
    if device == "cpu" and not torch.compiler.is_exporting():
        return torch.ops.stpp_kernels.depthwise_conv(x_NCHW, weight_C1KK, stride, dilation, padding)
    return _forward(x_NCHW, weight_C1KK, stride, dilation, padding)


def _check(x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Padding) -> None:
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[0] < 1:
        raise ValueError(
            f"x must be [N, C, H, W] and weight [C, 1, K, K] with C at least 1, got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"the kernel must be square with an odd side, got {tuple(weight.shape[2:])}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"x and weight must agree in dtype and device, got {x.dtype} on {x.device} and {weight.dtype} on "
            f"{weight.device}"
        )
    if stride < 1 or dilation < 1:
        raise ValueError(f"stride and dilation must be at least 1, got {stride} and {dilation}")
    if len(padding) != 4 or min(padding) < 0:
        raise ValueError(f"padding must be (left, right, above, below), each at least 0, got {padding}")
    rows, columns = _out_size(x, weight, stride, dilation, padding)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"a kernel of {weight.shape[2]} with dilation {dilation} does not fit into {tuple(x.shape[2:])} "
            f"with padding {padding}"
        )


def _out_size(x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Padding) -> tuple[int, int]:
    left, right, above, below = padding
    span = dilation * (weight.shape[2] - 1) + 1
    return (x.shape[2] + above + below - span) // stride + 1, (x.shape[3] + left + right - span) // stride + 1


def _forward(x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Padding) -> Tensor:
    """Runs PyTorch's convolution in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    out = reference.depthwise_conv(x, weight, stride, dilation, padding)
    return out.contiguous(memory_format=torch.channels_last)  # float64 and empty batches are NCHW


def _empty_gradients(x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0)
    return grad_x, torch.empty_like(weight) if need_weight else weight.new_empty(0)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Padding, need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    into = _empty_gradients(x, weight, need_x, need_weight)
    gradients = reference.depthwise_conv_backward(grad, x, weight, stride, dilation, padding, need_x,
                                                  need_weight)
    for target, source in zip(into, gradients, strict=True):
        target.copy_(source)
    return into


def _fake(x: Tensor, weight: Tensor, stride: int, dilation: int, padding: Padding) -> Tensor:
    size = (*x.shape[:2], *_out_size(x, weight, stride, dilation, padding))
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


dispatch.define(
    "depthwise_conv",
    "(Tensor x, Tensor weight, int stride, int dilation, SymInt[4] padding) -> Tensor",
    reference=_forward,
    fake=_fake,
    cpp=False,
)
dispatch.define(
    "depthwise_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, int stride, int dilation, SymInt[4] padding, bool need_x, "
    "bool need_weight) -> (Tensor grad_x, Tensor grad_weight)",
    reference=_plain_backward,
    fake=lambda grad, x, weight, stride, dilation, padding, need_x, need_weight: _empty_gradients(
        x, weight, need_x, need_weight
    ),
)


def _setup_context(ctx, inputs, output):
    x, weight, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    if torch.is_grad_enabled():
        raise RuntimeError("depthwise_conv has first derivatives only")
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.stpp_kernels.depthwise_conv_backward(
        grad, *ctx.saved_tensors, *ctx.geometry, need_x, need_weight
    )
    return grad_x if need_x else None, grad_weight if need_weight else None, None, None, None


torch.library.register_autograd("stpp_kernels::depthwise_conv", _backward, setup_context=_setup_context,
                                lib=dispatch.LIB)  # fmt: skip
for _device in ("cpu", "cuda"):
    dispatch.set_reported("depthwise_conv", _device, "conv2d")
dispatch.set_reported("depthwise_conv_backward", "cuda", "conv2d")
