"""ResNet-18, -50 and -101 with torchvision's layout and state-dict keys, and dilation in place of late
strides.

The variants with a deep stem, and its keys, are UniMatch's. The stride of a bottleneck is in its 3x3
convolution ("v1.5"). There is no classifier: the result is four feature maps.

Dilation: an `output_stride` of 16 or 8 removes the stride of layer 4, or of layers 3 and 4. A 3x3 convolution
is then dilated by the product of the strides removed *before* it; the convolution that lost its stride is not
affected. For bottlenecks this is torchvision's rule: the first block of a dilated stage keeps the previous
dilation. Basic blocks, which torchvision cannot dilate, have two 3x3 convolutions: in the first block of a
dilated stage the first keeps the previous dilation and the second has the new one. With this rule a dilated
network equals the strided one wherever the latter has a value (c4 at stride 8, every fourth row and column,
is c4 at stride 32), and ImageNet weights remain valid.
"""

from typing import NamedTuple

from torch import Tensor, nn

from stpp.models.layers import Conv3x3, conv3x3_bn_relu
from stpp.models.network import Backbone


class BasicBlock(nn.Module):
    """Basic block: two 3x3 convolutions and a shortcut, [N, in_channels, H, W] to [N, width, H / stride, W /
    stride].

    Args:
        in_channels: channels of the input.
        width: channels of both convolutions and of the output.
        stride: stride of the first convolution.
        dilation_before, dilation: see the top of this file; different only in the first block of a dilated
            stage.
        downsample: the shortcut's projection, or None for the identity.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation_before: int,
        dilation: int,
        downsample: nn.Module | None,
    ):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, width, stride, dilation_before)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width, 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = self.bn2(self.conv2(out_NCHW))
        shortcut_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out_NCHW += shortcut_NCHW  # in place: a map less in memory, and on a CPU no fresh pages
        return self.relu(out_NCHW)


class Bottleneck(nn.Module):
    """Bottleneck: 1x1, 3x3, 1x1 convolutions and a shortcut, [N, in_channels, H, W] to [N, 4 width, H /
    stride, W / stride].

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolution; the output has four times as many.
        stride: stride of the 3x3 convolution.
        dilation_before: dilation of the 3x3 convolution.
        dilation: dilation of the stage; unused, because only 1x1 convolutions follow.
        downsample: the shortcut's projection, or None for the identity.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        dilation_before: int,
        dilation: int,
        downsample: nn.Module | None,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv3x3(width, width, stride, dilation_before)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x_NCHW: Tensor) -> Tensor:
        out_NCHW = self.relu(self.bn1(self.conv1(x_NCHW)))
        out_NCHW = self.relu(self.bn2(self.conv2(out_NCHW)))
        out_NCHW = self.bn3(self.conv3(out_NCHW))
        shortcut_NCHW = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        out_NCHW += shortcut_NCHW  # in place: a map less in memory, and on a CPU no fresh pages
        return self.relu(out_NCHW)


class ResNetVariant(NamedTuple):
    """Layout of a ResNet."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    deep_stem: bool = False
    """Deep stem: three 3x3 convolutions of 64, 64 and 128 channels instead of one 7x7 of 64."""


VARIANTS = {
    "resnet18": ResNetVariant(BasicBlock, (2, 2, 2, 2)),
    "resnet50": ResNetVariant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": ResNetVariant(Bottleneck, (3, 4, 23, 3)),
    "resnet50-deep-stem": ResNetVariant(Bottleneck, (3, 4, 6, 3), deep_stem=True),
    "resnet101-deep-stem": ResNetVariant(Bottleneck, (3, 4, 23, 3), deep_stem=True),
}


class ResNet(Backbone):
    """ResNet without its classifier.

    Args:
        name: key of `VARIANTS`.
        output_stride: 8, 16 or 32: ratio of the input size to that of c4.

    Attributes:
        channels, strides: those of c1, c2, c3 and c4.

    Source: He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385.
    """

    classifier_keys = ("fc.",)
    block_types = (BasicBlock, Bottleneck)

    def __init__(self, name: str, output_stride: int):
        super().__init__()
        block, depths, deep_stem = VARIANTS[name]
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))
        self.strides = (4, 8, min(16, output_stride), output_stride)
        stem = 128 if deep_stem else 64
        self.conv1 = _deep_stem(stem) if deep_stem else nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        taken3 = output_stride == 8
        taken4 = output_stride in (8, 16)
        self.layer1 = _stage(block, depths[0], stem, 64, stride=1, dilation_before=1, dilation=1)
        self.layer2 = _stage(block, depths[1], self.channels[0], 128, stride=2, dilation_before=1, dilation=1)
        self.layer3 = _stage(
            block,
            depths[2],
            self.channels[1],
            256,
            stride=1 if taken3 else 2,
            dilation_before=1,
            dilation=2 if taken3 else 1,
        )
        self.layer4 = _stage(
            block,
            depths[3],
            self.channels[2],
            512,
            stride=1 if taken4 else 2,
            dilation_before=2 if taken3 else 1,
            dilation=32 // output_stride,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws random weights: He normal over the outputs; batch norm starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes feature maps c1 (a quarter of the input size), c2 (an eighth), c3, c4 (1 / output_stride),
        rounded up."""
        x_NCHW = self.maxpool(self.relu(self.bn1(self.conv1(images_NCHW))))
        c1 = self.layer1(x_NCHW)
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return c1, c2, c3, self.layer4(c3)


def _deep_stem(out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        *conv3x3_bn_relu(3, 64, stride=2), *conv3x3_bn_relu(64, 64), Conv3x3(64, out_channels)
    )


def _stage(
    block: type, depth: int, in_channels: int, width: int, stride: int, dilation_before: int, dilation: int
) -> nn.Sequential:
    """Makes a stage of `depth` blocks; the first has the stride, the projection (if shapes change), and the
    previous dilation."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    blocks = [block(in_channels, width, stride, dilation_before, dilation, downsample)]
    blocks += [block(out_channels, width, 1, dilation, dilation, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)
