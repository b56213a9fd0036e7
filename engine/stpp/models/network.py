"""Interface of all networks: a backbone computes feature maps, and a head decodes them."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Backbone(nn.Module):
    """Encoder: normalised images [N, 3, H, W] to four maps [N, C, h, w], from early to late stages."""

    channels: tuple[int, int, int, int]
    """Channels of the maps."""
    strides: tuple[int, int, int, int]
    """Input pixels per cell of the maps."""
    corner_grid: int | None = None
    """Grid g, in pixels: cells of the maps lie on it if sides are k * g + 1; None: any side will do."""
    classifier_keys: tuple[str, ...] = ()
    """Prefixes of a published file's keys that do not belong to the backbone."""
    exact_parts: tuple[str, ...] = ()
    """Names of the modules and buffers that are computed in float32 in half-precision networks too, because
    rounding in them would change many pixels' classes; `forward` converts between the two."""
    block_types: tuple[type[nn.Module], ...] = ()
    """Types of the repeated blocks."""


class Network(nn.Module):
    """Segmentation network: `decode(*features(images))` returns low-resolution logits.

    Between the two, a method may drop or scale channels of the maps.
    """

    head_lr_multiplier: float
    """Default ratio of the other parameters' learning rate to the backbone's."""
    classifier_name: str
    """Name of the module that computes the logits; its parameters have one row per class."""
    backbone: Backbone
    head_parts: tuple[str, ...] = ()
    """Names of the modules after the backbone that hold most of its layers, each called as a whole."""
    unused: tuple[str, ...] = ()
    """Modules and parameters in published files that no pass uses."""
    frozen = False
    frozen_norms = False
    pretrained: dict | None = None
    """Origin of the weights that training started from: `source` (file name), `sha256`, `licence` (SPDX, None
    if unknown), and `pretrained`, the file's own record if it has one; None: from scratch or unknown."""

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Computes the maps [N, C, h, w] for `decode` from normalised images [N, 3, H, W]."""
        raise NotImplementedError

    def decode(self, *maps: Tensor) -> Tensor:
        """Computes logits [N, num_classes, h, w] from the maps of `features`, possibly perturbed."""
        raise NotImplementedError

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Computes logits [N, num_classes, h, w] from normalised images [N, 3, H, W]."""
        return self.decode(*self.features(images_NCHW))

    def regions(self) -> list[nn.Module]:
        """Lists the parts to compile one by one: the backbone's blocks, and the head's parts."""
        blocks = [part for part in self.backbone.modules() if isinstance(part, self.backbone.block_types)]
        return blocks + [self.get_submodule(name) for name in self.head_parts]

    @property
    def least_px(self) -> int:
        """Minimum side of images in an exported graph, whose maps need two cells a side."""
        return max(self.backbone.strides) + 1

    @property
    def crop_multiple(self) -> int:
        """Divisor of the side of training crops, in pixels."""
        return 1

    def freeze_backbone(self) -> None:
        """Freezes the backbone: no gradients, and fixed batch-norm statistics."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def freeze_batch_norm(self) -> None:
        """Freezes the statistics of the backbone's batch norms."""
        self.frozen_norms = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "Network":
        """Sets the mode of the network; frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.backbone.modules() if self.frozen or self.frozen_norms else ():
            if self.frozen or isinstance(part, _BatchNorm):
                part.training = False
        return self
