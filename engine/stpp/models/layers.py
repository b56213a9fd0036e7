"""Layers that more than one network uses.

Shapes: N images, C channels, H and W rows and columns of a feature map.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpp_kernels import batch_norm_clamp, depthwise_conv, dilated_conv3x3


class Conv3x3(nn.Conv2d):
    """3x3 convolution without bias, `padding == dilation`, computed as one matrix product if the map is
    smaller than the weights.

    It is an `nn.Conv2d` (same parameters, same function, same state-dict keys). On a CPU, a convolution
    reorders its weights in every call. For 512 to 512 channels on eight maps of 2x2 that takes nine tenths of
    29 ms, forward and backward; gathering the inputs of each output and multiplying takes 5 ms
    (benchmarks/NOTES.md).

    Args:
        in_channels, out_channels: channels of the input and of the output.
        stride: stride of both axes.
        dilation: distance between taps in cells, at least 1.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1):
        super().__init__(
            in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride], rounded up."""
        if not eager_on_cpu(x_NCHW):
            return super().forward(x_NCHW)
        num_images, _, height, width = x_NCHW.shape
        dilation, stride = self.dilation[0], self.stride[0]
        rows, columns = -(-height // stride), -(-width // stride)
        small = self.training and num_images * rows * columns <= self.out_channels
        # With a stride, oneDNN's 16-bit convolution to a single column is wrong on AMX (benchmarks/NOTES.md).
        faulty = stride > 1 and columns == 1 and in_half_precision(x_NCHW)
        if not (small or faulty):
            return super().forward(x_NCHW)
        padded_NHWI = F.pad(x_NCHW.permute(0, 2, 3, 1), (0, 0, dilation, dilation, dilation, dilation))
        shifts = [(ky * dilation, kx * dilation) for ky in range(3) for kx in range(3)]
        taps = [
            padded_NHWI[:, y : y + rows * stride : stride, x : x + columns * stride : stride]
            for y, x in shifts
        ]
        read_NHWK = torch.cat([tap[:, :rows, :columns] for tap in taps], dim=3)
        weight_OK = self.weight.permute(0, 2, 3, 1).flatten(1)  # a view of a channels_last weight
        return F.linear(read_NHWK, weight_OK).permute(0, 3, 1, 2)


class DilatedConv3x3(nn.Conv2d):
    """3x3 convolution, stride 1, `padding == dilation`, that skips taps in the padding.

    It is an `nn.Conv2d` (same parameters, same function, same state-dict keys). At dilation 36 on a 41x41 map
    most of the nine taps read only zeros, which the operator does not multiply. Set `fused` to False for a
    plain convolution, for example in a graph for ONNX.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        dilation: distance between taps in cells, at least 1.
        bias: add a bias per output channel.
    """

    fused = True

    def __init__(self, in_channels: int, out_channels: int, dilation: int, bias: bool = False):
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to [N, out_channels, H, W], in autocast's dtype if autocast is on."""
        if not self.fused:
            return super().forward(x_NCHW)
        weight, bias = self.weight, self.bias
        device = x_NCHW.device.type
        # Autocast casts the inputs of a plain convolution, but not those of a custom operator.
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x_NCHW, weight = x_NCHW.to(dtype), weight.to(dtype)
        out_NCHW = dilated_conv3x3(x_NCHW, weight, self.dilation[0])
        return out_NCHW if bias is None else out_NCHW + bias.to(out_NCHW.dtype).view(1, -1, 1, 1)


class SameConv(nn.Conv2d):
    """Convolution without bias, with TensorFlow's "same" padding: the output has the size of the input over
    the stride, rounded up.

    The padding is split evenly, with an odd rest at the end. At stride 1 an odd kernel has no rest, so it is
    the symmetric padding of `nn.Conv2d`; at stride 2 there is one padding row less at the top if the number
    of rows is even.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel: odd side of the kernel.
        stride: 1 or 2.
        dilation: distance between taps in cells.
        groups: as in `nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            dilation=dilation,
            groups=groups,
            bias=False,
            padding=dilation * (kernel // 2) if stride == 1 else 0,
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride], rounded up."""
        if self.stride[0] == 1:
            return super().forward(x_NCHW)
        return super().forward(F.pad(x_NCHW, self.same(x_NCHW)))

    def same(self, x_NCHW: Tensor) -> tuple[int, int, int, int]:
        """Computes the padding of a map: columns left and right, rows above and below."""
        after = self.dilation[0] * (self.kernel_size[0] // 2)
        if self.stride[0] == 1:
            return after, after, after, after
        above, left = (after - 1 + size % 2 for size in x_NCHW.shape[2:])
        return left, after, above, after


class DepthwiseConv(SameConv):
    """Depthwise convolution, padded as `SameConv`.

    With gradients on a CPU it uses the operator `depthwise_conv`: the same function, with a much faster
    backward pass. Set `fused` to False for a plain convolution.

    Args:
        channels: channels of the input and of the output.
        kernel, stride, dilation: see `SameConv`.
    """

    fused = True

    def __init__(self, channels: int, kernel: int, *, stride: int = 1, dilation: int = 1):
        super().__init__(channels, channels, kernel, stride=stride, dilation=dilation, groups=channels)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, C, H, W] to [N, C, H / stride, W / stride], rounded up."""
        on_cpu = x_NCHW.device.type == "cpu" and not torch.compiler.is_exporting()
        if not (self.fused and on_cpu and torch.is_grad_enabled()):
            return super().forward(x_NCHW)
        return depthwise_conv(x_NCHW, self.weight, stride=self.stride[0], dilation=self.dilation[0],
                              padding=self.same(x_NCHW))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that `normalised` computes as one operator with the activation after it.

    It is an `nn.BatchNorm2d` (same parameters, buffers and function). Set `fused` to False for plain layers.
    """

    fused = True


def normalised(norm: nn.Module, x_NCHW: Tensor, activation: nn.Hardtanh | None = None) -> Tensor:
    """Applies batch norm and an activation that clamps, for example ReLU6.

    With the statistics of a batch on a CPU it uses the operator `batch_norm_clamp`: the same function and the
    same running averages, in less time and memory.

    Args:
        norm: a `BatchNorm`; or what replaced it in a network for inference or for synchronised statistics.
        x_NCHW: its input.
        activation: None: none.
    """
    fused = isinstance(norm, BatchNorm) and norm.fused and norm.training and x_NCHW.dtype != torch.float64
    if not fused or not eager_on_cpu(x_NCHW):
        out_NCHW = norm(x_NCHW)
        return out_NCHW if activation is None else activation(out_NCHW)
    limits = {} if activation is None else {"low": activation.min_val, "high": activation.max_val}
    out_NCHW, mean_C, variance_C = batch_norm_clamp(x_NCHW, norm.weight, norm.bias, eps=norm.eps, **limits)
    with torch.no_grad():
        norm.num_batches_tracked += 1
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        count = x_NCHW.numel() // len(mean_C)
        norm.running_mean.lerp_(mean_C, share)
        norm.running_var.lerp_(variance_C * (count / (count - 1)), share)  # averages of the unbiased variance
    return out_NCHW


def eager_on_cpu(x: Tensor) -> bool:
    """True on a CPU, except in compilation and export, which have operators of their own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def in_half_precision(x: Tensor) -> bool:
    """True if a convolution computes in 16 bits, by its input's dtype or under autocast."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Disables autocast inside the block if it is on; else does nothing, for example in export."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def conv1x1_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Makes a 1x1 convolution without bias, batch norm and ReLU, as a list for `nn.Sequential`."""
    return [
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def conv3x3_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    """Makes a 3x3 convolution without bias, batch norm and ReLU, as a list for `nn.Sequential`."""
    return [Conv3x3(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def global_average(x_NCHW: Tensor) -> Tensor:
    """Averages over H and W: [N, C, H, W] to [N, C, 1, 1]; unlike adaptive pooling, it exports with any
    size."""
    half = x_NCHW.dtype in (torch.bfloat16, torch.float16)
    if not half or not eager_on_cpu(x_NCHW):
        return x_NCHW.mean(dim=(2, 3), keepdim=True)
    # On a CPU, PyTorch's mean of channels_last maps in bfloat16 takes ten times as long as this product. The
    # factor is a power of two, hence exact, and keeps sums in the range of float16.
    width = x_NCHW.shape[3]
    factor = 2.0 ** -width.bit_length()
    x_NH1C = torch.full((1, width), factor, dtype=x_NCHW.dtype) @ x_NCHW.permute(0, 2, 3, 1)
    x_N1C = x_NH1C.float().mean(dim=1) / (factor * width)
    return x_N1C.to(x_NCHW.dtype).transpose(1, 2).unsqueeze(3)


def spread(x_NC11: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeats the only cell of a map `size` (rows, columns) times, the result of bilinear upsampling.

    It is a copy, because with a view of stride 0 among its inputs `torch.cat` returns NCHW, not
    channels_last.
    """
    return x_NC11.expand(-1, -1, *size).contiguous(memory_format=torch.channels_last)


def nearest_size(images_NCHW: Tensor, step: int, offset: int = 0) -> tuple[int, int]:
    """Computes the (rows, columns) nearest to the size of images among k * step + offset, k at least 1."""
    rows, columns = (max(1, (side - offset + step // 2) // step) * step + offset
                     for side in images_NCHW.shape[2:])
    return rows, columns


def fitted(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes images to the `size` that a backbone needs; images of that size are returned as they are.

    Corners are aligned, so logits that are upsampled with aligned corners to the original size match it.
    """
    if not torch.compiler.is_compiling() and size == tuple(images_NCHW.shape[2:]):
        return images_NCHW
    return upsample(images_NCHW, size)


def upsample(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map to `size` (rows, columns), bilinear with aligned corners."""
    return F.interpolate(x_NCHW, size=size, mode="bilinear", align_corners=True)
