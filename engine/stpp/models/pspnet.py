"""PSPNet: c4 beside its averages over 1, 4, 9 and 36 regions. Logits have c4's size.

Source: Zhao et al., "Pyramid Scene Parsing Network", arXiv 1612.01105, without the auxiliary loss.
"""

import torch
from torch import Tensor, nn

from stpp.models.layers import conv1x1_bn_relu, conv3x3_bn_relu, global_average, spread, upsample
from stpp.models.resnet import ResNet

BINS = (1, 2, 3, 6)


def pooling_matrix(size: int, bins: int, device: torch.device) -> Tensor:
    """The matrix [bins, size] whose product with a signal averages it as adaptive average pooling does, fp32.

    Bin i covers cells floor(i size / bins) up to, not including, ceil((i + 1) size / bins).
    """
    index = torch.arange(bins, device=device)
    start = (index * size) // bins
    end = ((index + 1) * size + bins - 1) // bins
    cell = torch.arange(size, device=device)
    inside = (cell >= start[:, None]) & (cell < end[:, None])
    return inside.float() / (end - start)[:, None]


def average_pool(x_NCHW: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling to `bins` x `bins` regions: [N, C, H, W] to [N, C, bins, bins], kept in channels_last.

    Two matrix products, columns first, so that W is a plain number when it is joined with another axis and split again:
    export follows that with any H and W. Unlike the backward of adaptive pooling, theirs is deterministic on CUDA.
    """
    height, width = x_NCHW.shape[2:]
    rows = pooling_matrix(height, bins, x_NCHW.device).to(x_NCHW.dtype)
    columns = pooling_matrix(width, bins, x_NCHW.device).to(x_NCHW.dtype)
    x_NHbC = columns @ x_NCHW.permute(0, 2, 3, 1)
    x_NbbC = (rows @ x_NHbC.flatten(2)).unflatten(2, x_NHbC.shape[2:])
    return x_NbbC.permute(0, 3, 1, 2)


class PyramidPooling(nn.Module):
    """c4 with its pyramid of averages appended: [N, C, H, W] to [N, 2 C, H, W].

    In training mode batch norm of the 1x1 level sees one value per channel and image, so it needs at least two images.
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

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.conv5 = nn.Sequential(
            PyramidPooling(channels),
            *conv3x3_bn_relu(2 * channels, channels // 4),
            nn.Dropout(0.1),
            nn.Conv2d(channels // 4, num_classes, 1),
        )

    def forward(self, c4_NCHW: Tensor) -> Tensor:
        return self.conv5(c4_NCHW)


class PSPNet(nn.Module):
    """PSPNet on a ResNet.

    Args:
        backbone: key of `stpp.models.resnet.LAYOUTS`.
        num_classes: channels of the logits.
        output_stride: 8, 16 or 32.
    """

    head_lr_multiplier = 10.0
    classifier_name = "head.conv5.5"

    def __init__(self, backbone: str, num_classes: int, output_stride: int):
        super().__init__()
        self.backbone = ResNet(backbone, output_stride)
        self.head = PSPHead(self.backbone.channels[3], num_classes)

    def decode(self, c4_NCHW: Tensor) -> Tensor:
        """Logits from c4: [N, C4, h, w] to [N, num_classes, h, w]."""
        return self.head(c4_NCHW)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes, H / output_stride, W / output_stride]."""
        return self.decode(self.backbone(images_NCHW)[3])
