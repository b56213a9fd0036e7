"""EfficientNet-Lite 0, 1 and 2 with the state-dict keys of the published PyTorch weights, and dilation in
place of late strides.

Inverted residual blocks with ReLU6, without squeeze-and-excitation and without a classifier: the result is
four feature maps. The stochastic depth of the published training is left out.

Padding is TensorFlow's "same": at stride 2 the padding of the first row depends on the size. Output i is
centred on row 2 i + 1 if the number of rows is even, and on row 2 i if it is odd. At stride 16, cells of an
image with even sides would lie up to 15 pixels off the grid that upsampling with aligned corners assumes, so
a segmentation network resizes images to sides of k * output_stride + 1 (`corner_grid`), at which all paddings
are symmetric.

Dilation: an `output_stride` of 16 or 8 removes the stride of the last, or the last two, of the strided
blocks, and dilates the later depthwise convolutions. As for the ResNets, a dilated network equals the strided
one wherever the latter has a value.

The stem and the first block are computed in float32 also under autocast, and in half-precision networks: in
bfloat16 their rounding changed the class of 1 % of the pixels of dark street scenes, that of the inputs and
all other layers of 0.06 % (benchmarks/NOTES.md).

Inputs have ImageNet normalisation; the published weights expect (x - 127) / 128 of bytes x. `forward`
converts the inputs rather than the weights, so that zero padding has the same meaning as in the published
network.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv
1905.11946; lite variants: TensorFlow's repository (efficientnet/lite).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stpp.models.layers import BatchNorm, DepthwiseConv, SameConv, normalised, without_autocast
from stpp.models.network import Backbone

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet mean and standard deviation, by which the inputs are normalised."""
EPS = 1e-3
"""Epsilon of batch norm, as published."""


class Blocks(NamedTuple):
    """Blocks of one stage; the first has the stride."""

    depth: int
    width: int
    kernel: int
    stride: int
    expansion: int = 6


def _stages(depths: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Blocks, ...]:
    kernels, strides, expansions = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), (1, 6, 6, 6, 6, 6, 6)
    return tuple(Blocks(*facts) for facts in zip(depths, widths, kernels, strides, expansions, strict=True))


VARIANTS = {
    "efficientnet-lite0": _stages((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet-lite1": _stages((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet-lite2": _stages((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
STEM = 32
"""Channels after the first convolution."""
TAPPED = (1, 2, 4, 6)
"""Stages whose outputs are c1, c2, c3 and c4: the last stage of each stride."""


class InvertedResidual(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, 1x1 projection, optional shortcut.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        expansion: factor of the inner channels; at 1 there is no expansion.
        kernel, stride, dilation: parameters of the depthwise convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        kernel: int,
        stride: int,
        dilation: int,
        shortcut: bool,
    ):
        super().__init__()
        width = in_channels * expansion
        if expansion != 1:
            self._expand_conv = nn.Conv2d(in_channels, width, 1, bias=False)
            self._bn0 = BatchNorm(width, eps=EPS)
        self._depthwise_conv = DepthwiseConv(width, kernel, stride=stride, dilation=dilation)
        self._bn1 = BatchNorm(width, eps=EPS)
        self._project_conv = nn.Conv2d(width, out_channels, 1, bias=False)
        self._bn2 = BatchNorm(out_channels, eps=EPS)
        self.relu = nn.ReLU6(inplace=True)
        self.expands, self.shortcut = expansion != 1, shortcut

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps [N, in_channels, H, W] to [N, out_channels, H / stride, W / stride], rounded up."""
        out_NCHW = normalised(self._bn0, self._expand_conv(x_NCHW), self.relu) if self.expands else x_NCHW
        out_NCHW = normalised(self._bn1, self._depthwise_conv(out_NCHW), self.relu)
        out_NCHW = normalised(self._bn2, self._project_conv(out_NCHW))
        if self.shortcut:
            out_NCHW += x_NCHW  # in place, as in the ResNets
        return out_NCHW


class EfficientNetLite(Backbone):
    """EfficientNet-Lite without its classifier.

    Args:
        name: key of `VARIANTS`.
        output_stride: 8, 16 or 32: ratio of the input size to that of c4.
    """

    classifier_keys = ("_conv_head.", "_bn1.", "_fc.")
    exact_parts = ("scale_1C11", "shift_1C11", "_conv_stem", "_blocks.0")
    block_types = (InvertedResidual,)

    def __init__(self, name: str, output_stride: int):
        super().__init__()
        stages = VARIANTS[name]
        self.channels = tuple(stages[i].width for i in TAPPED)
        self.strides = (4, 8, min(16, output_stride), output_stride)
        self.corner_grid = output_stride
        scale = [255 / 128 * std for std in STD]
        shift = [(255 * mean - 127) / 128 for mean in MEAN]
        self.register_buffer("scale_1C11", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift_1C11", torch.tensor(shift).view(1, 3, 1, 1), persistent=False)
        self._conv_stem = SameConv(3, STEM, 3, stride=2)
        self._bn0 = BatchNorm(STEM, eps=EPS)
        self.relu = nn.ReLU6(inplace=True)
        self._blocks = nn.ModuleList()
        self.ends: tuple[int, ...] = ()
        in_channels, stride, dilation = STEM, 2, 1
        for i, stage in enumerate(stages):
            stage_stride = stage.stride if stride * stage.stride <= output_stride else 1
            for first in (True,) + (False,) * (stage.depth - 1):
                self._blocks.append(
                    InvertedResidual(
                        in_channels,
                        stage.width,
                        expansion=stage.expansion,
                        kernel=stage.kernel,
                        stride=stage_stride if first else 1,
                        dilation=dilation,
                        shortcut=in_channels == stage.width and not (first and stage.stride > 1),
                    )
                )
                if first:  # the block that lost its stride keeps the previous dilation
                    stride, dilation = stride * stage_stride, dilation * stage.stride // stage_stride
                in_channels = stage.width
            if i in TAPPED:
                self.ends += (len(self._blocks) - 1,)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws random weights: He normal over the outputs of a group; batch norm starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels // module.groups * module.weight[0, 0].numel()
                nn.init.normal_(module.weight, 0.0, (2 / fan_out) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes feature maps c1 (a quarter of the input size), c2 (an eighth), c3, c4 (1 / output_stride),
        rounded up."""
        first, *others = self._blocks
        with without_autocast(images_NCHW.device):
            x_NCHW = images_NCHW.to(self.scale_1C11.dtype) * self.scale_1C11 + self.shift_1C11
            x_NCHW = first(normalised(self._bn0, self._conv_stem(x_NCHW), self.relu))
        x_NCHW = x_NCHW.to(others[0]._expand_conv.weight.dtype)
        maps = []
        for i, block in enumerate(others, 1):
            x_NCHW = block(x_NCHW)
            if i in self.ends:
                maps.append(x_NCHW)
        return tuple(maps)
