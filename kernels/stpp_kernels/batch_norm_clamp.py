"""Operator `batch_norm_clamp`: batch norm with the statistics of the batch, clamped, as one operator; with
the limits 0 and 6 it is batch norm and ReLU6.

For each channel, over the values x of all images and pixels, with d = x - mean(x) and
s = 1 / sqrt(mean(d^2) + eps):

    y = weight s d + bias,    out = min(max(y, low), high).

With g the gradient of out where low < y < high, else 0:

    dx = weight s (g - mean(g) - d s^2 mean(g d)),    dweight = s sum(g d),    dbias = sum(g).

Separate layers store y, which the gradient of the clamp needs. Here it is computed again from x, which saves
that memory, and five of thirteen passes over maps; memory bounds the time of both.

The C++ form is used on a CPU; on CUDA the layers of PyTorch (stpp.models.layers) are not replaced.

Shape suffixes: N images, C channels, H W rows and columns.
"""

import math

import torch
from torch import Tensor

from stpp_kernels import dispatch, reference


def batch_norm_clamp(
    x_NCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `F.batch_norm(x, None, None, weight, bias, training=True, eps=eps).clamp(low, high)`, and the
    statistics.

    Statistics and arithmetic are float32 (float64 for float64) whatever the dtype of x. Gradients are bitwise
    reproducible for any number of threads. First derivatives only.

    Args:
        x_NCHW: [N, C, H, W] floating point, any strides; channels_last is read without a copy.
        weight_C, bias_C: [C] floating point.
        low, high: limits of the output.
        eps: addend to the variance.

    Returns:
        The output, [N, C, H, W], channels_last, the dtype of x; mean and variance (biased) of each channel,
        float32 [C], without gradients.

    Raises:
        ValueError: shapes that do not fit, or fewer than two values for each channel.
    """
    if x_NCHW.ndim != 4 or weight_C.shape != x_NCHW.shape[1:2] or bias_C.shape != weight_C.shape:
        raise ValueError(f"x must be [N, C, H, W], weight and bias [C], got {tuple(x_NCHW.shape)}, "
                         f"{tuple(weight_C.shape)} and {tuple(bias_C.shape)}")
    if x_NCHW.shape[0] * x_NCHW.shape[2:].numel() < 2 or not len(weight_C):
        raise ValueError("expected more than 1 value per channel when training, got input size "
                         f"{tuple(x_NCHW.shape)}")
    return torch.ops.stpp_kernels.batch_norm_clamp(x_NCHW, weight_C, bias_C, low, high, eps)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


dispatch.define(
    "batch_norm_clamp",
    "(Tensor x, Tensor weight, Tensor bias, float low, float high, float eps) "
    "-> (Tensor out, Tensor mean, Tensor variance)",
    reference=reference.batch_norm_clamp,
    fake=lambda x, weight, bias, low, high, eps: (_like(x), _statistics_like(x), _statistics_like(x)),
)
dispatch.define(
    "batch_norm_clamp_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float low, "
    "float high, float eps) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    reference=reference.batch_norm_clamp_backward,
    fake=lambda grad, x, mean, variance, weight, bias, low, high, eps: (
        _like(x), torch.empty_like(weight), torch.empty_like(bias)
    ),
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.constants = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(x, mean, variance, weight, bias)


def _backward(ctx, grad, _mean, _variance):
    if torch.is_grad_enabled():
        raise RuntimeError("batch_norm_clamp has first derivatives only")
    gradients = torch.ops.stpp_kernels.batch_norm_clamp_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return *gradients, None, None, None


torch.library.register_autograd("stpp_kernels::batch_norm_clamp", _backward, setup_context=_setup_context,
                                lib=dispatch.LIB)  # fmt: skip
for _name in ("batch_norm_clamp", "batch_norm_clamp_backward"):
    dispatch.set_reported(_name, "cuda", "batch_norm")
