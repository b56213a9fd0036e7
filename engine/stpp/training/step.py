"""Step interface: the loss that a method computes from a batch. DistributedDataParallel wraps the step, not
the network, so a pass is one forward and one backward call however often a method calls its network.

Legend: N images, C classes, H W crop size, h w size of low-resolution logits, terms: parts of the loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stpp.config import Config
from stpp.loading.sample import Batch, Sample, Stream
from stpp.training.class_meter import ClassCounter
from stpp.training.class_rules import NONE


class Step(nn.Module, ABC):
    """Loss of one training step.

    Each stream provides one batch per pass. Every term of the loss is a sum over the pass, divided by a
    number of pixels that depends on the data alone (`pixels`), summed over all passes and ranks: the loss is
    the mean over the global batch.

    Args:
        network: network to train, on its device.
        config: config of the run.
    """

    weights: Mapping[str, float]
    """Weight of each term of the loss, by its key in the metrics; 0: a diagnostic. A class attribute, or set
    in `__init__`."""

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.network = network
        self.config = config
        self.rules = NONE
        """Class-wise rules, set by the run."""
        self.confident = ClassCounter()
        """Counter of the pixels that a method labels during training, by class."""

    @classmethod
    @abstractmethod
    def streams(cls, config: Config, *lists: Sequence[Sample]) -> tuple[Stream, ...]:
        """Makes the step's input streams, one per argument of `forward`, from the lists of its stage.

        Raises:
            UserError: a list is too short.
        """

    @abstractmethod
    def pixels(self, *batches: Batch) -> torch.Tensor:
        """Counts the pixels by which each term's sum is divided: int64 [terms] on the device, from the data
        alone."""

    @abstractmethod
    def forward(self, *batches: Batch) -> torch.Tensor:
        """Computes the sums of the terms over this pass: float32 [terms], in the order of `weights`."""

    def after_step(self, step: int) -> None:
        """Runs after optimiser step number `step`, counted from 0; for example to update an average of the
        weights."""

    @property
    def deployed(self) -> nn.Module:
        """Network that is validated, saved as best.pt and labels for later stages."""
        return self.network

    @property
    def compared(self) -> Mapping[str, nn.Module]:
        """Other networks that are validated for comparison, by the prefix of their keys in the metrics."""
        return {}
