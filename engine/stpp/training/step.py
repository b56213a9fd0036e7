"""The step protocol: what a method computes of a batch. DistributedDataParallel wraps the step, not the
network, so that a pass is one forward and one backward call however often a method calls its network.

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

    Each stream gives one batch a pass. Every term of the loss is a sum over the pass, divided by a number of
    pixels that the data alone decide (`pixels`), summed over all passes and ranks: the loss is the mean over
    the global batch.

    Args:
        network: to be trained, on its device.
        config: of the run.
    """

    weights: Mapping[str, float]
    """Factor of each term of the loss, by its key in the metrics; 0: a diagnostic. A class attribute, or set
    at the start."""

    def __init__(self, network: nn.Module, config: Config):
        super().__init__()
        self.network = network
        self.config = config
        self.rules = NONE
        """Rules by class, put there by the run."""
        self.confident = ClassCounter()
        """Pixels of each class that a method labels itself while it trains."""

    @classmethod
    @abstractmethod
    def streams(cls, config: Config, *lists: Sequence[Sample]) -> tuple[Stream, ...]:
        """Streams that the step is fed, each one argument of `forward`, from the lists that its stage passes
        on.

        Raises:
            UserError: a list does not suffice.
        """

    @abstractmethod
    def pixels(self, *batches: Batch) -> torch.Tensor:
        """Pixels that each term's sum is divided by: int64 [terms] on the device, from the data alone."""

    @abstractmethod
    def forward(self, *batches: Batch) -> torch.Tensor:
        """Sums of the terms over this pass: float32 [terms], in the order of `weights`."""

    def after(self, step: int) -> None:
        """Runs after the optimiser's step number `step`, counted from 0: an average of the weights, for
        example."""

    @property
    def deployed(self) -> nn.Module:
        """Network that is validated, kept as best.pt and labels later stages."""
        return self.network

    @property
    def compared(self) -> Mapping[str, nn.Module]:
        """Further networks that are validated for comparison, by the prefix of their keys in the metrics."""
        return {}
