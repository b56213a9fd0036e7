"""Cross entropy of bilinearly upsampled logits, with its gradient, from the low-resolution logits alone.

Let z_p be the logits of a full-size pixel p, interpolated (`align_corners=True`) from the low-resolution
logits x_k:

    z_p = sum_k w_pk x_k,   w_pk >= 0,   sum_k w_pk = 1,   at most four corners k have w_pk > 0.

With label y_p and pixel weight v_p (class weight times pixel weight; 0 where ignored) the loss sum and its
gradient are

    L = sum_p v_p (logsumexp(z_p) - z_p[y_p]),        dL/dz_p = v_p (softmax(z_p) - onehot(y_p)),
    dL/dx_k = sum_p w_pk dL/dz_p.

Only the last sum couples pixels, so a pixel's logits, softmax and gradient can stay in registers: all pixels
of one low-resolution cell (the square between four neighbouring x_k) read the same four corners and add to
the same four. The interpolation is separable, w_pk = r_p(row of k) c_p(column of k), which both kernels use:
corners are interpolated along x once per cell row, then along y for every pixel row; the gradient is summed
along y first and along x once per cell row. Memory traffic is that of the logits, their gradient and the
labels, about 1/16 of one full-size tensor at a factor of four. The gradient is computed together with the
loss, so backward is one multiplication.
"""

import torch
from torch import Tensor

from stpp_kernels import dispatch, reference

SCHEMA = (
    "(Tensor logits, Tensor labels, Tensor? class_weight, Tensor? pixel_weight, int ignore_index, bool "
    "with_gradient) -> (Tensor loss, Tensor counted, Tensor gradient)"
)


def _fake(logits, labels, class_weight, pixel_weight, ignore_index, with_gradient):
    loss = logits.new_empty((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    counted = logits.new_empty((), dtype=torch.int64)
    dtype = reference.gradient_dtype(logits.dtype)
    gradient = torch.empty_like(logits, dtype=dtype) if with_gradient else logits.new_empty(0, dtype=dtype)
    return loss, counted, gradient


_op = dispatch.define(
    "upsample_cross_entropy",
    SCHEMA,
    reference=reference.upsample_cross_entropy,
    fake=_fake,
    triton="triton.cross_entropy:upsample_cross_entropy",
)


def _setup_context(ctx, inputs, output):
    ctx.logits_dtype = inputs[0].dtype
    ctx.has_gradient = inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])


def _backward(ctx, grad_loss, _grad_counted, _grad_gradient):
    # create_graph=True: the gradient is a result of the forward pass, not a function of the logits
    if torch.is_grad_enabled():
        raise RuntimeError("upsample_cross_entropy has first derivatives only")
    if grad_loss is None:
        return None, None, None, None, None, None
    if not ctx.has_gradient:
        raise RuntimeError("upsample_cross_entropy was called with with_gradient=False and cannot run "
                           "backward")
    (gradient,) = ctx.saved_tensors
    # In float32, not in the logits' dtype: 1 / counted pixels underflows in float16.
    scaled = gradient.to(grad_loss.dtype) * grad_loss
    return scaled.to(ctx.logits_dtype), None, None, None, None, None


torch.library.register_autograd("stpp_kernels::upsample_cross_entropy", _backward,
                                setup_context=_setup_context, lib=dispatch.LIB)  # fmt: skip


def upsample_cross_entropy(
    logits_NChw: Tensor,
    labels_NHW: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the sum over pixels of the cross entropy of logits upsampled to the labels' size, and the
    number of counted pixels.

    Eager equivalent, with full-size tensors: `F.cross_entropy(F.interpolate(logits, labels.shape[1:],
    mode="bilinear", align_corners=True), labels.long(), ignore_index=ignore_index, weight=class_weight,
    reduction="sum")`. Divide by the count for the mean; under data parallelism, sum the count over ranks
    first. Bitwise reproducible on a CPU and on CUDA.

    Args:
        logits_NChw: [N, C, h, w], float32, bfloat16 or float16 (float64: plain PyTorch), any strides, C up
            to 256.
        labels_NHW: [N, H, W], uint8 or int64, in [0, C) or `ignore_index`; H and W may have any size, also
            below h and w.
        ignore_index: label of pixels that do not count.
        class_weight: [C] float, weight of a pixel's loss by its label; not differentiated.
        pixel_weight: [N, H, W] float, weight of a pixel's loss; not differentiated.

    Returns:
        The loss sum, a float32 scalar (nats), and the number of counted pixels, an int64 scalar: those whose
        label is not `ignore_index`, whatever their weight. If every pixel is ignored: 0 with a gradient of
        zeros, and 0.

    Raises:
        ValueError: wrong shapes or dtypes; on a CPU also a label outside [0, C) that is not `ignore_index`,
            which on CUDA fails an asynchronous assertion.
    """
    _check(logits_NChw, labels_NHW, class_weight, pixel_weight)
    with_gradient = torch.is_grad_enabled() and logits_NChw.requires_grad
    class_weight, pixel_weight = (None if weight is None else weight.detach()
                                  for weight in (class_weight, pixel_weight))
    loss, counted, _ = torch.ops.stpp_kernels.upsample_cross_entropy(
        logits_NChw, labels_NHW, class_weight, pixel_weight, ignore_index, with_gradient
    )
    return loss, counted


def _check(logits: Tensor, labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None) -> None:
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [N, C, h, w], got {logits.dtype} "
                         f"{tuple(logits.shape)}")
    if (
        labels.ndim != 3
        or labels.shape[0] != logits.shape[0]
        or labels.dtype not in (torch.uint8, torch.int64)
    ):
        raise ValueError(
            f"labels must be uint8 or int64 [N, H, W] with N = {logits.shape[0]}, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if not 1 <= logits.shape[1] <= 256:
        raise ValueError(f"logits must have 1 to 256 classes, got {logits.shape[1]}")
    if logits.shape[2] < 1 or logits.shape[3] < 1:
        raise ValueError(f"logits must have at least one row and column, got {tuple(logits.shape)}")
    if class_weight is not None and class_weight.shape != (logits.shape[1],):
        raise ValueError(f"class_weight must be [{logits.shape[1]}], got {tuple(class_weight.shape)}")
    if pixel_weight is not None and pixel_weight.shape != labels.shape:
        raise ValueError(f"pixel_weight must be {tuple(labels.shape)} as the labels, got "
                         f"{tuple(pixel_weight.shape)}")
    for other in (labels, class_weight, pixel_weight):
        if other is not None and other.device != logits.device:
            raise ValueError(f"all arguments must be on {logits.device} as the logits, got one on "
                             f"{other.device}")
