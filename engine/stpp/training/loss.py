"""The loss of labelled pixels: cross-entropy, of all of them or of the hardest."""

import torch

from stpp.config import TrainConfig
from stpp.images.masks import IGNORE
from stpp_kernels import label_probability, upsample_cross_entropy

OHEM_PROBABILITY, OHEM_KEPT = 0.7, 200_000
"""Pixels are dropped whose label is more probable than this, as long as so many of the pass are kept.

Source: UniMatch's Cityscapes settings.
"""


def labelled_loss(logits_NChw: torch.Tensor, labels_NHW: torch.Tensor, train: TrainConfig) -> torch.Tensor:
    """Sum of the cross-entropy over the counted pixels of a pass: float32 scalar.

    With `--train.loss ohem`, the mean over the hardest pixels times the counted ones, so that it is divided
    by the same number.
    """
    kept_NHW = hardest(logits_NChw, labels_NHW) if train.loss == "ohem" else labels_NHW
    loss, kept = upsample_cross_entropy(logits_NChw, kept_NHW, ignore_index=IGNORE)
    if train.loss == "ce":
        return loss
    return loss / kept.clamp(min=1) * (labels_NHW != IGNORE).sum()


@torch.no_grad()
def hardest(logits_NChw: torch.Tensor, labels_NHW: torch.Tensor) -> torch.Tensor:
    """Labels with 255 in place of easy ones: those more probable than 0.7 and than the 200,000th least
    probable of the pass."""
    if labels_NHW.numel() < OHEM_KEPT:
        return labels_NHW
    # Pixels without a label have probability 2: where too few have one, the threshold lies above all.
    probability_NHW = label_probability(logits_NChw, labels_NHW, ignore_index=IGNORE)
    threshold = probability_NHW.flatten().kthvalue(OHEM_KEPT).values.clamp(min=OHEM_PROBABILITY)
    return labels_NHW.masked_fill(probability_NHW > threshold, IGNORE)
