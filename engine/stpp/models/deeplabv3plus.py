"""DeepLabV3+: atrous spatial pyramid pooling on c4, refined with c1. Logits have c1's size, a quarter of the
input's.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation",
arXiv 1802.02611, with the plain convolutions and the channel counts of the public ST++ networks.
"""

import torch
from torch import Tensor, nn

from stpp.models.layers import (
    DilatedConv3x3,
    conv1x1_bn_relu,
    conv3x3_bn_relu,
    fitted,
    global_average,
    nearest_size,
    spread,
    upsample,
)
from stpp.models.network import Backbone, Network

ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (6, 12, 18)}
REDUCED = 48
"""Channels of c1 in the decoder."""


class GlobalAverage(nn.Module):
    """Module of `global_average`: the first of four layers in the numbering of published state dicts."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return global_average(x_NCHW)


class PooledContext(nn.Module):
    """Image-level features, spread over the map: [N, in_channels, H, W] to [N, out_channels, H, W].

    In training mode batch norm has one value per channel and image, so it needs at least two images.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.gap = nn.Sequential(GlobalAverage(), *conv1x1_bn_relu(in_channels, out_channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return spread(self.gap(x_NCHW), x_NCHW.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of c4, five branches: [N, in_channels, H, W] to [N, width, H, W].

    Args:
        in_channels: channels of c4.
        rates: dilations of the three 3x3 branches.
        width: channels of each branch and of the output.
        dropout: channel dropout of the output in training.
    """

    def __init__(self, in_channels: int, rates: tuple[int, int, int], *, width: int, dropout: bool):
        super().__init__()
        self.b0 = nn.Sequential(*conv1x1_bn_relu(in_channels, width))
        self.b1, self.b2, self.b3 = (_dilated_branch(in_channels, width, rate) for rate in rates)
        self.b4 = PooledContext(in_channels, width)
        self.project = nn.Sequential(
            *conv1x1_bn_relu(5 * width, width), *([nn.Dropout2d(0.5)] if dropout else [])
        )

    def forward(self, c4_NCHW: Tensor) -> Tensor:
        branches = (self.b0, self.b1, self.b2, self.b3, self.b4)
        return self.project(torch.cat([branch(c4_NCHW) for branch in branches], dim=1))


class DeepLabV3Plus(Network):
    """DeepLabV3+ on a backbone of output stride 8, 16 or 32, which determines the rates of the pyramid.

    Args:
        backbone: its first map has a stride of 4.
        num_classes: channels of the logits.
        width: channels of the pyramid; None: an eighth of c4's.
        decoder_width: channels of the two convolutions before the classifier.
        dropout: dropout after the pyramid and before the classifier, in training.
    """

    head_lr_multiplier = 10.0
    classifier_name = "classifier"
    head_parts = ("head", "fuse")

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        width: int | None = None,
        decoder_width: int = 256,
        dropout: bool = True,
    ):
        super().__init__()
        self.backbone = backbone
        c1_channels, _, _, c4_channels = backbone.channels
        width = width or c4_channels // 8
        self.head = ASPP(c4_channels, ASPP_RATES[backbone.strides[3]], width=width, dropout=dropout)
        self.reduce = nn.Sequential(*conv1x1_bn_relu(c1_channels, REDUCED))
        self.fuse = nn.Sequential(
            *conv3x3_bn_relu(REDUCED + width, decoder_width),
            *conv3x3_bn_relu(decoder_width, decoder_width),
            *([nn.Dropout(0.1)] if dropout else []),
        )
        self.classifier = nn.Conv2d(decoder_width, num_classes, 1)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images [N, 3, H, W] to c1 (a quarter of the size, rounded up) and c4.

        A backbone with a grid (`corner_grid`) gets images resized to its nearest sides.
        """
        if grid := self.backbone.corner_grid:
            images_NCHW = fitted(images_NCHW, nearest_size(images_NCHW, grid, 1))
        c1_NCHW, _, _, c4_NCHW = self.backbone(images_NCHW)
        return c1_NCHW, c4_NCHW

    def decode(self, c1_NCHW: Tensor, c4_NCHW: Tensor) -> Tensor:
        """Logits from feature maps: [N, C1, H, W] and [N, C4, h, w] to [N, num_classes, H, W]."""
        context_NCHW = upsample(self.head(c4_NCHW), c1_NCHW.shape[2:])
        return self.classifier(self.fuse(torch.cat([self.reduce(c1_NCHW), context_NCHW], dim=1)))


def _dilated_branch(in_channels: int, out_channels: int, rate: int) -> nn.Sequential:
    return nn.Sequential(
        DilatedConv3x3(in_channels, out_channels, rate), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )
