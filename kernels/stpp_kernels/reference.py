"""Reference implementations of the fused operators in plain PyTorch: the oracle of the tests, and the
fallback.

Shape suffixes: N images, C classes, h w low-resolution size, H W full size, O I output and input channels.
Every function computes in float32 (float64 for float64 input) whatever the input's dtype, has no autograd,
and may hold full-size tensors, one image at a time if possible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(maps_NChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes to `size` (height, width), bilinear with `align_corners=True`, in float32 or float64."""
    return F.interpolate(_compute_type(maps_NChw), size=tuple(size), mode="bilinear", align_corners=True)


def upsample_cross_entropy(
    logits_NChw: Tensor,
    labels_NHW: Tensor,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (loss sum, counted pixels, gradient of the loss sum in `gradient_dtype`, empty unless
    `with_gradient`)."""
    num_classes = logits_NChw.shape[1]
    height, width = labels_NHW.shape[1:]
    counted_NHW = labels_NHW != ignore_index
    labels = torch.where(counted_NHW, labels_NHW, 0).long()
    check_range(labels, num_classes, "a label")
    labels = labels.clamp(0, num_classes - 1)  # on CUDA the check fails after the reads below
    weight_NHW = counted_NHW.to(_compute_type(logits_NChw).dtype)
    if class_weight is not None:
        weight_NHW = weight_NHW * class_weight.to(weight_NHW.dtype)[labels]
    if pixel_weight is not None:
        weight_NHW = torch.where(counted_NHW, weight_NHW * pixel_weight.to(weight_NHW.dtype), 0.0)
    loss = weight_NHW.new_zeros(())
    gradient = logits_NChw.new_empty(0, dtype=gradient_dtype(logits_NChw.dtype))
    if with_gradient:
        gradient = torch.empty_like(logits_NChw, dtype=gradient.dtype)
        # The adjoint of upsampling as matrix products: PyTorch's is not deterministic on CUDA.
        rows_hH, columns_wW = (_weights(logits_NChw, axis, size) for axis, size in ((2, height), (3, width)))
    for n in range(logits_NChw.shape[0]):
        log_prob = upsample(logits_NChw[n : n + 1], (height, width)).log_softmax(1)
        label, weight = labels[n][None, None], weight_NHW[n][None, None]
        loss -= (log_prob.gather(1, label) * weight).sum()
        if with_gradient:
            residual = log_prob.exp_().scatter_add_(1, label, -torch.ones_like(weight)).mul_(weight)
            gradient[n : n + 1] = rows_hH @ residual @ columns_wW.t()
    return loss, counted_NHW.sum(), gradient


def _weights(logits: Tensor, axis: int, size: int) -> Tensor:
    """Computes the interpolation weights [low-resolution size, `size`] along an axis: column p holds the
    weights of the inputs of full-size pixel p."""
    small = logits.shape[axis]
    identity = _compute_type(torch.eye(small, dtype=logits.dtype, device=logits.device))
    return upsample(identity.view(1, small, small, 1), (size, 1))[0, :, :, 0]


def upsample_argmax(logits_NChw: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Computes (mask uint8 [N, H, W], probability of the chosen class [N, H, W])."""
    masks, confidences = [], []
    for n in range(logits_NChw.shape[0]):
        full = upsample(logits_NChw[n : n + 1], size)
        masks.append(full.argmax(1).to(torch.uint8))
        confidences.append((full.amax(1) - full.logsumexp(1)).exp())
    if not masks:
        empty = logits_NChw.new_empty((0, *size))
        return empty.to(torch.uint8), _compute_type(empty)
    return torch.cat(masks), torch.cat(confidences)


def label_probability(logits_NChw: Tensor, labels_NHW: Tensor, ignore_index: int) -> Tensor:
    """Computes the probability of each pixel's label [N, H, W]: 2 for `ignore_index`, 0 for no class."""
    ignored, known = labels_NHW == ignore_index, labels_NHW.short() < logits_NChw.shape[1]
    probability_NHW = _compute_type(logits_NChw).new_empty(labels_NHW.shape)
    for n in range(logits_NChw.shape[0]):
        probability = upsample(logits_NChw[n : n + 1], labels_NHW.shape[1:]).softmax(1)
        label = torch.where(known[n], labels_NHW[n], 0).long()
        probability_NHW[n] = probability.gather(1, label[None, None])[0, 0]
    return probability_NHW.masked_fill_(~known, 0.0).masked_fill_(ignored, 2.0)


def softmax_accumulate(
    acc_NCHW: Tensor, logits_NChw: Tensor, scaled_size: tuple[int, int], size: tuple[int, int], flip: bool
) -> None:
    """Adds the softmax at `scaled_size`, mirrored back if `flip` and resized to `size`, to `acc_NCHW` in
    place."""
    for n in range(logits_NChw.shape[0]):
        prob = upsample(logits_NChw[n : n + 1], scaled_size).softmax(1)
        acc_NCHW[n : n + 1] += upsample(prob.flip(3) if flip else prob, size)


def finalize(acc_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (mask uint8 [N, H, W], mean normalised probability of the chosen class [N], class counts int64
    [N, C])."""
    num_images, num_classes = acc_NCHW.shape[:2]
    value_NHW, mask_NHW = acc_NCHW.max(1)
    mean_N = (value_NHW / acc_NCHW.sum(1)).flatten(1).mean(1)
    counts_NC = torch.zeros(num_images, num_classes, dtype=torch.int64, device=acc_NCHW.device)
    flat = mask_NHW.flatten(1)
    counts_NC.scatter_add_(1, flat, torch.ones_like(flat))
    return mask_NHW.to(torch.uint8), mean_N, counts_NC


def confusion(pred: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Computes per-image matrices, int64 [N, C, C] (rows truth, columns prediction), of [N, H, W] masks,
    without pixels where `target == ignore_index`."""
    num_images = target.shape[0]
    counted = target != ignore_index
    pred, target = (torch.where(counted, mask, 0).long().flatten(1) for mask in (pred, target))
    check_range(target, num_classes, "a target")
    check_range(pred, num_classes, "a prediction")
    cell = target.clamp(0, num_classes - 1) * num_classes + pred.clamp(0, num_classes - 1)
    matrix = torch.zeros(num_images, num_classes * num_classes, dtype=torch.int64, device=target.device)
    matrix.scatter_add_(1, cell, counted.flatten(1).long())
    return matrix.view(num_images, num_classes, num_classes)


def iou_from_confusion(matrix_NCC: Tensor) -> Tensor:
    """Computes the mean IoU, float64 [N], over classes that occur in truth or prediction; 0 if none does."""
    matrix = matrix_NCC.double()
    both = matrix.diagonal(dim1=1, dim2=2)
    either = matrix.sum(1) + matrix.sum(2) - both
    present = either > 0
    iou = torch.where(present, both / either.clamp(min=1), 0.0)
    return iou.sum(1) / present.sum(1).clamp(min=1)


def dilated_conv3x3(x_NIHW: Tensor, weight_OI33: Tensor, dilation: int) -> Tensor:
    """Runs `F.conv2d` with a 3x3 kernel, stride 1, padding = dilation, no bias: same height and width."""
    return F.conv2d(x_NIHW, weight_OI33, padding=dilation, dilation=dilation)


def dilated_conv3x3_backward(
    grad_NOHW: Tensor, x_NIHW: Tensor, weight_OI33: Tensor, dilation: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Computes (gradient of x, gradient of weight); an unneeded one is an empty tensor."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_NOHW, x_NIHW, weight_OI33, None, [1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1,
        [need_x, need_weight, False],
    )  # fmt: skip
    empty = x_NIHW.new_empty(0)
    return grad_x if need_x else empty, grad_weight if need_weight else empty


def depthwise_conv(
    x_NCHW: Tensor, weight_C1KK: Tensor, stride: int, dilation: int, padding: tuple[int, int, int, int]
) -> Tensor:
    """Runs a depthwise `F.conv2d` after `F.pad` by (left, right, top, bottom)."""
    channels = x_NCHW.shape[1]
    left, right, top, bottom = padding
    if left == right and top == bottom:
        return F.conv2d(x_NCHW, weight_C1KK, None, stride, (top, left), dilation, channels)
    return F.conv2d(F.pad(x_NCHW, padding), weight_C1KK, None, stride, 0, dilation, channels)


def depthwise_conv_backward(
    grad_NCHW: Tensor,
    x_NCHW: Tensor,
    weight_C1KK: Tensor,
    stride: int,
    dilation: int,
    padding: tuple[int, int, int, int],
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Computes (gradient of x, gradient of weight); an unneeded one is an empty tensor."""
    left, right, top, bottom = padding
    even = left == right and top == bottom
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_NCHW, x_NCHW if even else F.pad(x_NCHW, padding), weight_C1KK, None, [stride] * 2,
        [top, left] if even else [0, 0], [dilation] * 2, False, [0, 0], x_NCHW.shape[1],
        [need_x, need_weight, False],
    )  # fmt: skip
    empty = x_NCHW.new_empty(0)
    if need_x and not even:
        grad_x = F.pad(grad_x, [-side for side in padding])
    return grad_x if need_x else empty, grad_weight if need_weight else empty


def batch_norm_clamp(
    x_NCHW: Tensor, weight_C: Tensor, bias_C: Tensor, low: float, high: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (batch norm with the batch's statistics, clamped to [low, high]; mean; biased variance)."""
    variance_C, mean_C = torch.var_mean(_compute_type(x_NCHW), (0, 2, 3), correction=0)
    y_NCHW = _normalised(x_NCHW, mean_C, variance_C, weight_C, bias_C, eps).clamp_(low, high)
    return y_NCHW.to(x_NCHW.dtype).contiguous(memory_format=torch.channels_last), mean_C, variance_C


def batch_norm_clamp_backward(
    grad_NCHW: Tensor, x_NCHW: Tensor, mean_C: Tensor, variance_C: Tensor, weight_C: Tensor, bias_C: Tensor,
    low: float, high: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the gradients of (x, weight, bias)."""
    y_NCHW = _normalised(x_NCHW, mean_C, variance_C, weight_C, bias_C, eps)
    grad_NCHW = _compute_type(grad_NCHW).masked_fill((y_NCHW <= low) | (y_NCHW >= high), 0)
    apart_NCHW = _compute_type(x_NCHW) - mean_C.view(1, -1, 1, 1)
    inverse_C = (variance_C + eps).rsqrt()
    mean_grad_C = grad_NCHW.mean((0, 2, 3))
    mean_product_C = (grad_NCHW * apart_NCHW).mean((0, 2, 3))
    slope_C = mean_product_C * inverse_C.square()
    grad_x = (grad_NCHW - mean_grad_C.view(1, -1, 1, 1) - apart_NCHW * slope_C.view(1, -1, 1, 1))
    grad_x *= (weight_C.to(grad_x.dtype) * inverse_C).view(1, -1, 1, 1)
    count = grad_x[:, 0].numel()
    return (grad_x.to(x_NCHW.dtype).contiguous(memory_format=torch.channels_last),
            (mean_product_C * inverse_C * count).to(weight_C.dtype), (mean_grad_C * count).to(bias_C.dtype))


def _normalised(
    x_NCHW: Tensor, mean_C: Tensor, variance_C: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
) -> Tensor:
    scale_C = weight_C.to(mean_C.dtype) * (variance_C + eps).rsqrt()
    apart_NCHW = _compute_type(x_NCHW) - mean_C.view(1, -1, 1, 1)
    return apart_NCHW * scale_C.view(1, -1, 1, 1) + bias_C.to(mean_C.dtype).view(1, -1, 1, 1)


def gradient_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Dtype of the gradient of the loss *sum* until it is scaled.

    float16 would overflow: one low-resolution logit may collect more than 65504 pixels.
    """
    return torch.float32 if logits_dtype == torch.float16 else logits_dtype


def check_range(indices: Tensor, num_classes: int, what: str) -> None:
    """Checks that all indices are in [0, num_classes).

    Raises:
        ValueError: one is not (on the CPU; on CUDA an asynchronous assertion fails).
    """
    outside = (indices < 0) | (indices >= num_classes)
    if indices.device.type == "cuda":
        torch._assert_async(~outside.any(),
                            f"{what} lies outside [0, {num_classes}) and is not the ignore index")
    elif indices.device.type == "cpu" and bool(outside.any()):
        value = indices[outside][0].item()
        raise ValueError(f"{what} is {value}, outside [0, {num_classes}) and not the ignore index; check the "
                         "masks")


def _compute_type(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
