"""Teachers: what turns images into low-resolution logits."""

from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from stpp import checkpoint
from stpp.errors import UserError
from stpp.models.build import build_model
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


def load_network(path: str | Path) -> tuple[nn.Module, list[str]]:
    """The network of a checkpoint written by a training run, and its class names.

    Raises:
        UserError: not such a checkpoint.
    """
    saved = checkpoint.load(path)
    try:
        architecture, classes = saved["architecture"], list(saved["classes"])
        network = build_model(architecture["name"], architecture["backbone"], len(classes),
                              architecture["output_stride"])
        network.load_state_dict(saved["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: holds no network of this version ({reason}); give a best.pt or third-*.pt") from None
    return network, classes
