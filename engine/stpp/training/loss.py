"""Loss of labelled pixels: cross-entropy of all pixels, or of the hardest (OHEM).

Legend: N images, C classes, h w size of low-resolution logits, H W crop size.
"""

import torch

from stpp.config import TrainConfig
from stpp.images.masks import IGNORE
from stpp.training.class_rules import NONE, ClassRules
from stpp_kernels import label_probability

OHEM_PROBABILITY, OHEM_KEPT = 0.7, 200_000
"""OHEM: pixels whose label has a higher probability are dropped; minimum number of pixels kept in a pass.

Source: UniMatch's Cityscapes settings.
"""
OHEM_IMAGE = 8
"""OHEM by image: at least one pixel in so many is kept. (200,000 pixels are one in 6.4 of two crops of
801.)"""


def labelled_loss(logits_NChw: torch.Tensor, labels_NHW: torch.Tensor, train: TrainConfig,
                  rules: ClassRules = NONE) -> torch.Tensor:
    """Sums the cross-entropy over the counted pixels of a pass: float32 scalar.

    With `--train.loss ohem`, the mean over the hardest pixels of the pass times the number of counted pixels,
    because the caller divides by that number; with `ohem-image` the same image by image, so that the sum does
    not depend on the distribution of images over passes and ranks.
    """
    if train.loss == "ohem-image":
        kept_NHW = hardest_of_images(rules.adjusted(logits_NChw), labels_NHW)
        return rules.cross_entropy(logits_NChw, kept_NHW, balancing_weights(kept_NHW, labels_NHW))[0]
    kept_NHW = hardest(rules.adjusted(logits_NChw), labels_NHW) if train.loss == "ohem" else labels_NHW
    loss, kept = rules.cross_entropy(logits_NChw, kept_NHW)
    if train.loss == "ce":
        return loss
    return loss / kept.clamp(min=1) * (labels_NHW != IGNORE).sum()


@torch.no_grad()
def hardest(logits_NChw: torch.Tensor, labels_NHW: torch.Tensor) -> torch.Tensor:
    """Replaces easy labels by 255: those with a probability above 0.7 and above the 200,000th lowest of the
    pass."""
    if labels_NHW.numel() < OHEM_KEPT:
        return labels_NHW
    # Pixels without a label have probability 2: if too few have one, no label exceeds the threshold.
    probability_NHW = label_probability(logits_NChw, labels_NHW, ignore_index=IGNORE)
    threshold = _lowest(probability_NHW.flatten(), OHEM_KEPT).clamp(min=OHEM_PROBABILITY)
    return labels_NHW.masked_fill(probability_NHW > threshold, IGNORE)


@torch.no_grad()
def hardest_of_images(logits_NChw: torch.Tensor, labels_NHW: torch.Tensor) -> torch.Tensor:
    """Replaces easy labels by 255: those with a probability above 0.7 and above the lowest eighth of their
    image."""
    probability_NHW = label_probability(logits_NChw, labels_NHW, ignore_index=IGNORE)
    per_image = labels_NHW[0].numel()
    threshold_N = _lowest(probability_NHW.flatten(1), -(-per_image // OHEM_IMAGE)).clamp(min=OHEM_PROBABILITY)
    return labels_NHW.masked_fill(probability_NHW > threshold_N[:, None, None], IGNORE)


def _lowest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the k-th lowest value along the last axis; `kthvalue` has no deterministic form on CUDA."""
    return values.topk(k, largest=False, sorted=False).values.amax(-1)


@torch.no_grad()
def balancing_weights(kept_NHW: torch.Tensor, labels_NHW: torch.Tensor) -> torch.Tensor:
    """Computes pixel weights by which the kept pixels of an image weigh as much as all its labelled ones:
    float32 [N, H, W]."""
    kept_N, all_N = ((masks != IGNORE).flatten(1).sum(1) for masks in (kept_NHW, labels_NHW))
    return (all_N / kept_N.clamp(min=1)).float()[:, None, None].expand(kept_NHW.shape).contiguous()
