"""PSPNet: c4 joined with its averages over 1, 4, 9 and 36 regions. Logits have c4's size.

Source: Zhao et al., "Pyramid Scene Parsing Network", arXiv 1612.01105, without the auxiliary loss.
"""

import torch
from torch import Tensor, nn

from stpp.models.layers import conv1x1_bn_relu, conv3x3_bn_relu, global_average, spread, upsample
from stpp.models.network import Backbone, Network

BINS = (1, 2, 3, 6)


def pooling_matrix(size: int, bins: int, device: torch.device) -> Tensor:
    """Computes the fp32 matrix [bins, size] of adaptive average pooling along one axis.

    Bin i covers cells floor(i size / bins) up to, not including, ceil((i + 1) size / bins).
    """
    index = torch.arange(bins, device=device)
    start = (index * size) // bins
    end = ((index + 1) * size + bins - 1) // bins
    cell = torch.arange(size, device=device)
    inside = (cell >= start[:, None]) & (cell < end[:, None])
    return inside.float() / (end - start)[:, None]


def average_pool(x_NCHW: Tensor, bins: int) -> Tensor:
    """Pools adaptively to `bins` x `bins` regions: [N, C, H, W] to [N, C, bins, bins], channels_last.

    It is two matrix products, columns first, so that W is fixed when it is merged with another axis and split
    again: this exports with any H and W. Unlike that of adaptive pooling, the backward is deterministic on
    CUDA.
    """
    height, width = x_NCHW.shape[2:]
    rows = pooling_matrix(height, bins, x_NCHW.device).to(x_NCHW.dtype)
    columns = pooling_matrix(width, bins, x_NCHW.device).to(x_NCHW.dtype)
    x_NHbC = columns @ x_NCHW.permute(0, 2, 3, 1)
    x_NbbC = (rows @ x_NHbC.flatten(2)).unflatten(2, x_NHbC.shape[2:])
    return x_NbbC.permute(0, 3, 1, 2)


class PyramidPooling(nn.Module):
    """Pyramid pooling: c4 joined with its averages, [N, C, H, W] to [N, 2 C, H, W].

    In training mode batch norm of the 1x1 level has one value per channel and image, so it needs at least two
    images.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (
            nn.Sequential(*conv1x1_bn_relu(channels, channels // 4)) for _ in BINS
        )

    def forward(self, c4_NCHW: Tensor) -> Tensor:
        size = c4_NCHW.shape[2:]
        pyramid = [c4_NCHW, spread(self.conv1(global_average(c4_NCHW)), size)]
        for bins, level in zip(BINS[1:], (self.conv2, self.conv3, self.conv4), strict=True):
            pyramid.append(upsample(level(average_pool(c4_NCHW, bins)), size))
        return torch.cat(pyramid, dim=1)


class PSPHead(nn.Module):
    """Pyramid pooling and the classifier: [N, C, H, W] to logits [N, num_classes, H, W]."""

    def __init__(self, channels: int, num_classes: int, dropout: bool):
        super().__init__()
        self.conv5 = nn.Sequential(
            PyramidPooling(channels),
            *conv3x3_bn_relu(2 * channels, channels // 4),
            nn.Dropout(0.1) if dropout else nn.Identity(),
            nn.Conv2d(channels // 4, num_classes, 1),
        )

    def forward(self, c4_NCHW: Tensor) -> Tensor:
        return self.conv5(c4_NCHW)


class PSPNet(Network):
    """PSPNet on the last map of a backbone.

    Args:
        backbone: channels of its last map are a multiple of 4.
        num_classes: channels of the logits.
        dropout: dropout before the classifier, in training.
    """

    head_lr_multiplier = 10.0
    classifier_name = "head.conv5.5"
    head_parts = ("head",)

    def __init__(self, backbone: Backbone, num_classes: int, *, dropout: bool = True):
        super().__init__()
        self.backbone = backbone
        self.head = PSPHead(backbone.channels[3], num_classes, dropout)

    def features(self, images_NCHW: Tensor) -> tuple[Tensor]:
        """Normalised images [N, 3, H, W] to c4 [N, C4, H / output_stride, W / output_stride], rounded up."""
        return (self.backbone(images_NCHW)[3],)

    def decode(self, c4_NCHW: Tensor) -> Tensor:
        """Logits from c4: [N, C4, h, w] to [N, num_classes, h, w]."""
        return self.head(c4_NCHW)
