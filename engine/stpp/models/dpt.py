"""DPT on a vision transformer, as in UniMatch V2: four maps of one size are resized to four scales and fused
from coarse to fine.

Logits have 8 cells for 14 pixels of the input. There is no batch norm.

Source: Ranftl et al., "Vision Transformers for Dense Prediction", arXiv 2103.13413; sizes as in UniMatch V2
(Yang et al., arXiv 2410.10777). The 1x1 convolution after a fusion runs before its upsampling, on a quarter
of the cells: bilinear weights sum to 1, so the function is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpp.models.layers import fitted, nearest_size, upsample
from stpp.models.network import Backbone, Network


class ResidualUnit(nn.Module):
    """Residual unit of two 3x3 convolutions, each after a ReLU: [N, C, H, W] to [N, C, H, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW + self.conv2(F.relu(self.conv1(F.relu(x_NCHW))))


class Fusion(nn.Module):
    """Fusion of a map with the result of the coarser ones, and upsampling.

    Args:
        width: channels of all maps.
        coarsest: there is no coarser result. Published files still have the weights of that branch; they are
            not trained.
    """

    def __init__(self, width: int, *, coarsest: bool = False):
        super().__init__()
        self.out_conv = nn.Conv2d(width, width, 1)
        self.resConfUnit1 = ResidualUnit(width).requires_grad_(not coarsest)
        self.resConfUnit2 = ResidualUnit(width)

    def forward(self, x_NCHW: Tensor, fine_NCHW: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Fuses the result of the coarser maps with the map of the same size, to [N, width, *size]."""
        if fine_NCHW is not None:
            x_NCHW = x_NCHW + self.resConfUnit1(fine_NCHW)
        return upsample(self.out_conv(self.resConfUnit2(x_NCHW)), size)


class DPTHead(nn.Module):
    """DPT head: four maps [N, in_channels, h, w] to logits [N, num_classes, 8 h, 8 w].

    Args:
        in_channels: channels of the maps.
        widths: channels of the four scales, from fine to coarse.
        width: channels of the fused maps.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int], width: int, num_classes: int):
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(in_channels, scale, 1) for scale in widths)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()  # the name in the published keys
        for i, scale in enumerate(widths, 1):
            self.scratch.add_module(f"layer{i}_rn", nn.Conv2d(scale, width, 3, padding=1, bias=False))
        for i in (1, 2, 3, 4):
            self.scratch.add_module(f"refinenet{i}", Fusion(width, coarsest=i == 4))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, num_classes, 1)
        )

    def forward(self, *maps: Tensor) -> Tensor:
        scales = [
            resize(project(x))
            for project, resize, x in zip(self.projects, self.resize_layers, maps, strict=True)
        ]
        x1, x2, x3, x4 = (
            self.scratch.get_submodule(f"layer{i}_rn")(x) for i, x in enumerate(scales, 1)
        )
        x = self.scratch.refinenet4(x4, None, x3.shape[2:])
        x = self.scratch.refinenet3(x, x3, x2.shape[2:])
        x = self.scratch.refinenet2(x, x2, x1.shape[2:])
        x = self.scratch.refinenet1(x, x1, (2 * x1.shape[2], 2 * x1.shape[3]))
        return self.scratch.output_conv(x)


class DPT(Network):
    """DPT on an encoder whose four maps have one cell for each patch.

    Args:
        backbone: encoder whose strides all equal the side of its patches.
        num_classes: channels of the logits.
        widths, width: see `DPTHead`.
    """

    head_lr_multiplier = 40.0
    classifier_name = "head.scratch.output_conv.2"
    head_parts = ("head",)
    unused = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1")

    def __init__(
        self, backbone: Backbone, num_classes: int, *, widths: tuple[int, int, int, int], width: int
    ):
        super().__init__()
        self.backbone = backbone
        self.head = DPTHead(backbone.channels[3], widths, width, num_classes)

    @property
    def least_px(self) -> int:
        """Minimum side of images in an exported graph: three patches, because the coarsest map halves
        them."""
        patch = self.backbone.strides[0]
        return 3 * patch - patch // 2

    @property
    def crop_multiple(self) -> int:
        """Divisor of the crop side: the side of a patch; other crops would have to be resized."""
        return self.backbone.strides[0]

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Computes four maps [N, D, h, w], with a cell for each patch, of normalised images [N, 3, H, W].

        In evaluation, sides are resized to the nearest multiple of the patch, as in the public code: bilinear
        with aligned corners. Logits upsampled to the original size with aligned corners thus match the image.

        Raises:
            ValueError: a side in training is no multiple of the patch; choose another crop size.
        """
        patch = self.backbone.strides[0]
        size = nearest_size(images_NCHW, patch)
        if self.training and not torch.compiler.is_compiling() and size != tuple(images_NCHW.shape[2:]):
            raise ValueError(f"images of {tuple(images_NCHW.shape[2:])} pixels do not divide into patches of "
                             f"{patch}; train on crops of {size}")
        return self.backbone(fitted(images_NCHW, size))

    def decode(self, *maps: Tensor) -> Tensor:
        """Computes logits [N, num_classes, 8 h, 8 w] of the four maps, [N, D, h, w] each."""
        return self.head(*maps)
