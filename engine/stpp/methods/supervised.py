"""Supervised training: cross-entropy on masks, which may be pseudo labels; the training stages of ST and
ST++.

Source: ST++ (arXiv 2106.05095).
"""

from collections.abc import Sequence

import torch

from stpp.config import Config
from stpp.images.masks import IGNORE
from stpp.loading.sample import Batch, Sample, Stream
from stpp.methods.stages import Stages
from stpp.training.loss import labelled_loss
from stpp.training.step import Step

FEW_LABELS = 200
"""Length below which a labelled list is repeated twice."""


class Supervised(Step):
    """Cross-entropy, summed over the counted pixels of a pass; `Trainer.train_step` divides the sums by the
    pixels of the global batch, and runs the backward pass."""

    weights = {"loss": 1.0}

    @classmethod
    def streams(cls, config: Config, samples: Sequence[Sample]) -> tuple[Stream, ...]:
        return (Stream(samples=samples),)

    def pixels(self, batch: Batch) -> torch.Tensor:
        return (batch.labels_NHW != IGNORE).sum()[None]

    def forward(self, batch: Batch) -> torch.Tensor:
        logits_NChw = self.network(batch.images_NCHW)
        return labelled_loss(logits_NChw, batch.labels_NHW, self.config.train, self.rules)[None]


def train(run: Stages) -> None:
    """Runs one stage on the labels alone."""
    run.train("1-supervised", Supervised, repeat_few(run.labelled), supervised=True)


def repeat_few(labelled: Sequence[Sample]) -> list[Sample]:
    """Repeats the labelled samples twice if there are fewer than `FEW_LABELS`."""
    return list(labelled) * (2 if len(labelled) < FEW_LABELS else 1)
