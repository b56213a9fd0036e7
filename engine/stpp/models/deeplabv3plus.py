"""DeepLabV3+: atrous spatial pyramid pooling on c4, refined with c1. Logits have c1's size, a quarter of the input's.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", arXiv
1802.02611, with the plain convolutions and the channel counts of the public ST++ networks.
"""

import torch
from torch import Tensor, nn

from stpp.models.layers import DilatedConv3x3, conv1x1_bn_relu, conv3x3_bn_relu, global_average, spread, upsample
from stpp.models.resnet import ResNet

ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (6, 12, 18)}


class GlobalAverage(nn.Module):
    """`global_average` as a module: published state dicts count it as the first of four layers."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return global_average(x_NCHW)


class PooledContext(nn.Module):
    """One vector an image, spread over the map: [N, in_channels, H, W] to [N, out_channels, H, W].

    In training mode batch norm sees one value per channel and image, so it needs at least two images.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.gap = nn.Sequential(GlobalAverage(), *conv1x1_bn_relu(in_channels, out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return spread(self.gap(x_NCHW), x_NCHW.shape[2:])


class ASPP(nn.Module):
    """Five views of c4 at different ranges, joined: [N, in_channels, H, W] to [N, in_channels / 8, H, W].

    Args:
        in_channels: channels of c4.
        rates: dilations of the three 3x3 branches.
    """

    def __init__(self, in_channels: int, rates: tuple[int, int, int]):
        super().__init__()
        width = in_channels // 8
        self.b0 = nn.Sequential(*conv1x1_bn_relu(in_channels, width))
        self.b1, self.b2, self.b3 = (_dilated_branch(in_channels, width, rate) for rate in rates)
        self.b4 = PooledContext(in_channels, width)
        self.project = nn.Sequential(*conv1x1_bn_relu(5 * width, width), nn.Dropout2d(0.5))

    def forward(self, c4_NCHW: Tensor) -> Tensor:
        branches = (self.b0, self.b1, self.b2, self.b3, self.b4)
        return self.project(torch.cat([branch(c4_NCHW) for branch in branches], dim=1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ on a ResNet.

    Args:
        backbone: key of `stpp.models.resnet.LAYOUTS`.
        num_classes: channels of the logits.
        output_stride: 8, 16 or 32; it also chooses the rates of the pyramid.
    """

    head_lr_multiplier = 10.0
    classifier_name = "classifier"

    def __init__(self, backbone: str, num_classes: int, output_stride: int):
        super().__init__()
        self.backbone = ResNet(backbone, output_stride)
        c1_channels, _, _, c4_channels = self.backbone.channels
        self.head = ASPP(c4_channels, ASPP_RATES[output_stride])
        self.reduce = nn.Sequential(*conv1x1_bn_relu(c1_channels, 48))
        self.fuse = nn.Sequential(
            *conv3x3_bn_relu(48 + c4_channels // 8, 256), *conv3x3_bn_relu(256, 256), nn.Dropout(0.1)
        )
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def decode(self, c1_NCHW: Tensor, c4_NCHW: Tensor) -> Tensor:
        """Logits from feature maps: [N, C1, H, W] and [N, C4, h, w] to [N, num_classes, H, W]."""
        context_NCHW = upsample(self.head(c4_NCHW), c1_NCHW.shape[2:])
        return self.classifier(self.fuse(torch.cat([self.reduce(c1_NCHW), context_NCHW], dim=1)))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes, H / 4, W / 4] (sizes rounded up)."""
        c1_NCHW, _, _, c4_NCHW = self.backbone(images_NCHW)
        return self.decode(c1_NCHW, c4_NCHW)


def _dilated_branch(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    return nn.Sequential(
        DilatedConv3x3(in_channels, out_channels, rate), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )
