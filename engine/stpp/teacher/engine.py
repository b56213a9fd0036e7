"""Teachers: what turns images into low-resolution logits."""

from typing import Protocol

import torch
from torch import nn

from stpp.teacher import fold


class Teacher(Protocol):
    """Images in, logits out."""

    num_classes: int

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Low-resolution float32 logits [N, C, h, w] of normalised float32 channels_last images, any size."""
        ...


class EagerTeacher:
    """A copy of a network as PyTorch runs it."""

    def __init__(self, network: nn.Module, *, num_classes: int, device: torch.device, dtype: torch.dtype):
        self._network = fold.ready(network, device=device, dtype=dtype)
        self.num_classes, self._dtype = num_classes, dtype

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See `Teacher`."""
        return self._network(images_NCHW.to(self._dtype))
