"""Interface that all networks share: a backbone gives maps, and a head decodes them."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Backbone(nn.Module):
    """An encoder: normalised images [N, 3, H, W] to four maps [N, C, h, w], from near the image to far from
    it."""

    channels: tuple[int, int, int, int]
    """Of the maps."""
    strides: tuple[int, int, int, int]
    """Input pixels per cell of the maps."""
    classifier_keys: tuple[str, ...] = ()
    """Beginnings of the keys that a published file has besides the backbone's."""


class Network(nn.Module):
    """A network of segmentation: `decode(*features(images))` gives low-resolution logits.

    Between the two, a method may drop or scale channels of the maps.
    """

    head_lr_multiplier: float
    """Learning rate of the other parameters over the backbone's, where a recipe names none."""
    classifier_name: str
    """The module that gives the logits: its parameters have one row a class."""
    backbone: Backbone
    unused: tuple[str, ...] = ()
    """Modules and parameters that published files have and no pass reads."""
    frozen = False
    frozen_norms = False
    pretrained: dict | None = None
    """Origin of the weights that training started from: `source` (file name), `sha256`, `licence` (SPDX, None
    if unknown), and `pretrained`, the file's own record if it has one; None: from scratch or unknown."""

    def features(self, images_NCHW: Tensor) -> tuple[Tensor, ...]:
        """Normalised images [N, 3, H, W] to the maps [N, C, h, w] that `decode` takes."""
        raise NotImplementedError

    def decode(self, *maps: Tensor) -> Tensor:
        """The maps of `features`, as they are or perturbed, to logits [N, num_classes, h, w]."""
        raise NotImplementedError

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes, h, w]."""
        return self.decode(*self.features(images_NCHW))

    @property
    def least_px(self) -> int:
        """Smallest side of images in an exported graph, whose maps need two cells a side."""
        return max(self.backbone.strides) + 1

    @property
    def crop_multiple(self) -> int:
        """Pixels that the side of training crops is a multiple of."""
        return 1

    def freeze_backbone(self) -> None:
        """Keeps the backbone as it is: no gradients, and batch norms that use and keep their stored
        statistics."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def freeze_batch_norm(self) -> None:
        """Keeps the statistics of the backbone's batch norms as they are, and uses them."""
        self.frozen_norms = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "Network":
        """Sets the mode of the whole network; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.backbone.modules() if self.frozen or self.frozen_norms else ():
            if self.frozen or isinstance(part, _BatchNorm):
                part.training = False
        return self
