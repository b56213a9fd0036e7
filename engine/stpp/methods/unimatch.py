"""UniMatch: the network labels the weak view of an unlabelled image, and learns from two strong views and
from the weak view with half of its features dropped.

Source: "Revisiting Weak-to-Strong Consistency" (CVPR 2023, arXiv 2208.09910). Departures are in
docs/unimatch.md.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stpp.config import Config
from stpp.images.masks import IGNORE
from stpp.loading.sample import Batch, Sample, Stream
from stpp.methods import consistency
from stpp.methods.consistency import mixed_losses, mixed_views, pseudo_labels, shown_pixels, weak_and_strong
from stpp.methods.stages import Stages
from stpp.training.loss import labelled_loss
from stpp.training.step import Step


class UniMatch(Step):
    """Loss (labelled + (strong 1 + strong 2) / 4 + dropped / 2) / 2, each a mean over the global batch."""

    weights = {"loss_labelled": 0.5, "loss_strong_1": 0.125, "loss_strong_2": 0.125, "loss_dropped": 0.25,
               "confident_share": 0.0}

    @classmethod
    def streams(cls, config: Config, labelled: Sequence[Sample],
                unlabelled: Sequence[Sample]) -> tuple[Stream, ...]:
        return weak_and_strong(labelled, unlabelled, strong=2)

    def pixels(self, x: Batch, u: Batch) -> torch.Tensor:
        weak, strong_1, strong_2 = shown_pixels(u)
        return torch.stack([(x.labels_NHW != IGNORE).sum(), strong_1, strong_2, weak, weak])

    def forward(self, x: Batch, u: Batch) -> torch.Tensor:
        n, m = len(x.images_NCHW), len(u.images_NCHW)
        maps = self.network.features(torch.cat([x.images_NCHW, u.images_NCHW]))
        both = [torch.cat([each, F.dropout2d(each, 0.5)]) for each in maps]
        # Dropped features of labelled images only enter the decoder's batch norm.
        logits_x, logits_w, _, logits_d = self.network.decode(*both).split([n, m, n, m])
        labels_NHW = pseudo_labels(logits_w, u, self.config.consistency.confidence, self.rules)
        self.confident.add(labels_NHW)
        strong_1, strong_2 = mixed_losses(self.network(mixed_views(u)).chunk(2), labels_NHW, u, self.rules)
        dropped, confident = self.rules.cross_entropy(logits_d, labels_NHW)
        labelled = labelled_loss(logits_x, x.labels_NHW, self.config.train, self.rules)
        return torch.stack([labelled, strong_1, strong_2, dropped, confident.float()])


def train(run: Stages) -> None:
    """Runs the stages of UniMatch."""
    consistency.train(run, "unimatch", UniMatch)
