"""Class-wise rules of a step: loss weights, logit offsets, confidence thresholds of pseudo labels.

They depend only on the settings and the labelled pixels, so they are the same in every step, on every rank,
and after a resume.

Legend: N images, C classes, h w size of low-resolution logits, H W crop size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stpp import by_class
from stpp.config import Config, RareConfig
from stpp.images.masks import IGNORE
from stpp_kernels import upsample_cross_entropy


@dataclass(frozen=True, kw_only=True)
class ClassRules:
    """Class-wise treatment of losses and pseudo labels; none by default."""

    weight_C: torch.Tensor | None = None
    """Loss weight by label, float32 on the device; its mean over the labelled pixels is 1."""
    offset_C: torch.Tensor | None = None
    """Offset of the logits in training, float32 on the device."""
    confidence_C: torch.Tensor | None = None
    """Confidence threshold of pseudo labels by class, float32 on the device; None: one for all classes."""

    def cross_entropy(self, logits_NChw: torch.Tensor, labels_NHW: torch.Tensor,
                      pixel_weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums the loss over the counted pixels, and counts them; see `upsample_cross_entropy`.

        Interpolation preserves a constant offset, so offsets are added to the low-resolution logits.
        """
        return upsample_cross_entropy(self.adjusted(logits_NChw), labels_NHW, ignore_index=IGNORE,
                                      class_weight=self.weight_C, pixel_weight=pixel_weight)

    def adjusted(self, logits_NChw: torch.Tensor) -> torch.Tensor:
        """Adds the offsets to the logits."""
        if self.offset_C is None:
            return logits_NChw
        return logits_NChw.float() + self.offset_C[:, None, None]

    def is_confident(self, labels_NHW: torch.Tensor, probability_NHW: torch.Tensor,
                     confidence: float) -> torch.Tensor:
        """Selects pixels that reach the confidence threshold of their class: bool [N, H, W]."""
        if self.confidence_C is None:
            return probability_NHW >= confidence
        return probability_NHW >= self.confidence_C[labels_NHW.int()]


NONE = ClassRules()


def for_run(config: Config, classes: Sequence[str], pixels_C: Sequence[int],
            device: torch.device) -> ClassRules:
    """Makes the rules of a config.

    Args:
        pixels_C: labelled pixels of each class in the labelled list.

    Raises:
        UserError: a setting names a class that does not exist.
    """
    def on_device(values: Sequence[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)

    rare, consistency = config.rare, config.consistency
    confidences = by_class.filled(consistency.class_confidence, "consistency.class-confidence", classes,
                                  consistency.confidence)
    return ClassRules(weight_C=on_device(loss_weights(pixels_C, rare)),
                      offset_C=on_device(offsets(pixels_C, rare)),
                      confidence_C=on_device(confidences) if consistency.class_confidence else None)


def loss_weights(pixels_C: Sequence[int], rare: RareConfig) -> list[float] | None:
    """Computes the class weights of the loss; None if all are 1.

    For a class of n pixels: 1 / sqrt(n), or 1 / E(n) with the effective number
    E(n) = N (1 - (1 - 1 / N)^n), N = `effective_pixels`. Weights are clipped to `most_weight` times the
    smallest and scaled to a mean of 1 over the labelled pixels, so that the scale of the loss, and with it
    the effect of the learning rate, is unchanged. A class without a labelled pixel has weight 1.

    Source: "Class-Balanced Loss Based on Effective Number of Samples" (arXiv 1901.05555), equation 2.
    """
    if rare.weights == "none" or not any(pixels_C):
        return None
    if rare.weights == "inverse-sqrt":
        raw = [1 / math.sqrt(n) if n else 0.0 for n in pixels_C]
    else:
        raw = [1 / _effective(n, rare.effective_pixels) if n else 0.0 for n in pixels_C]
    most = rare.most_weight * min(weight for weight in raw if weight)
    clipped = [min(weight, most) for weight in raw]
    mean = sum(n * weight for n, weight in zip(pixels_C, clipped, strict=True)) / sum(pixels_C)
    return [weight / mean if n else 1.0 for n, weight in zip(pixels_C, clipped, strict=True)]


def _effective(n: int, most: float) -> float:
    if most <= 1:
        return 1.0
    return -most * math.expm1(n * math.log1p(-1 / most))


def offsets(pixels_C: Sequence[int], rare: RareConfig) -> list[float] | None:
    """Computes the logit offsets: `logit_adjustment` times the logarithm of the class's share of the labelled
    pixels; None if all are 0. A class without labelled pixels counts as one pixel.

    Source: "Long-Tail Learning via Logit Adjustment" (arXiv 2007.07314), equation 10.
    """
    total = sum(pixels_C)
    if not rare.logit_adjustment or not total:
        return None
    return [rare.logit_adjustment * math.log(max(n, 1) / total) for n in pixels_C]
