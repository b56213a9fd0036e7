"""Rules of a step by class: factors of the loss, offsets of the logits, least confidences of pseudo labels.

They come from the settings and from the labelled pixels alone, so they are the same in every step, on every
rank, and after a resume.

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
    """What a step does to the classes one by one; nothing by default."""

    weight_C: torch.Tensor | None = None
    """Factor of a pixel's loss by its label, float32 on the device; its mean over the labelled pixels is
    1."""
    offset_C: torch.Tensor | None = None
    """Added to the logits in training, float32 on the device."""
    confidence_C: torch.Tensor | None = None
    """Least probability of a pseudo label by class, float32 on the device; None: the setting, for all."""

    def cross_entropy(self, logits_NChw: torch.Tensor, labels_NHW: torch.Tensor,
                      pixel_weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the loss over the counted pixels, and their number: see `upsample_cross_entropy`.

        Interpolation keeps an offset that is the same everywhere, so it is added to the small logits.
        """
        return upsample_cross_entropy(self.adjusted(logits_NChw), labels_NHW, ignore_index=IGNORE,
                                      class_weight=self.weight_C, pixel_weight=pixel_weight)

    def adjusted(self, logits_NChw: torch.Tensor) -> torch.Tensor:
        """Logits as the loss sees them."""
        if self.offset_C is None:
            return logits_NChw
        return logits_NChw.float() + self.offset_C[:, None, None]

    def is_sure(self, labels_NHW: torch.Tensor, probability_NHW: torch.Tensor,
                confidence: float) -> torch.Tensor:
        """Pixels whose probability suffices for their class: bool [N, H, W]."""
        if self.confidence_C is None:
            return probability_NHW >= confidence
        return probability_NHW >= self.confidence_C[labels_NHW.int()]


NONE = ClassRules()


def of_run(config: Config, classes: Sequence[str], pixels_C: Sequence[int],
           device: torch.device) -> ClassRules:
    """The rules that a config asks for.

    Args:
        pixels_C: labelled pixels of each class in the labelled list.

    Raises:
        UserError: a setting names a class that does not exist.
    """
    def there(values: Sequence[float] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=device)

    rare, consistency = config.rare, config.consistency
    confidences = by_class.filled(consistency.class_confidence, "consistency.class-confidence", classes,
                                  consistency.confidence)
    return ClassRules(weight_C=there(loss_weights(pixels_C, rare)), offset_C=there(offsets(pixels_C, rare)),
                      confidence_C=there(confidences) if consistency.class_confidence else None)


def loss_weights(pixels_C: Sequence[int], rare: RareConfig) -> list[float] | None:
    """Factors of the classes in the loss; None where all are 1.

    With n pixels of a class: 1 / sqrt(n), or 1 / E(n) with the effective number
    E(n) = N (1 - (1 - 1 / N)^n), N = `effective_pixels`. They are cut to `most_weight` times the smallest and
    scaled to a mean of 1 over the labelled pixels, so that the loss, and with it the learning rate, keeps its
    size. A class without a labelled pixel has 1.

    Source: "Class-Balanced Loss Based on Effective Number of Samples" (arXiv 1901.05555), equation 2.
    """
    if rare.weights == "none" or not any(pixels_C):
        return None
    if rare.weights == "inverse-sqrt":
        raw = [1 / math.sqrt(n) if n else 0.0 for n in pixels_C]
    else:
        raw = [1 / _effective(n, rare.effective_pixels) if n else 0.0 for n in pixels_C]
    most = rare.most_weight * min(one for one in raw if one)
    cut = [min(one, most) for one in raw]
    mean = sum(n * one for n, one in zip(pixels_C, cut, strict=True)) / sum(pixels_C)
    return [one / mean if n else 1.0 for n, one in zip(pixels_C, cut, strict=True)]


def _effective(n: int, most: float) -> float:
    if most <= 1:
        return 1.0
    return -most * math.expm1(n * math.log1p(-1 / most))


def offsets(pixels_C: Sequence[int], rare: RareConfig) -> list[float] | None:
    """Offsets of the logits in training: `logit_adjustment` times the logarithm of the class's share of the
    labelled pixels; None where all are 0. A class without one counts as one pixel.

    Source: "Long-Tail Learning via Logit Adjustment" (arXiv 2007.07314), equation 10.
    """
    total = sum(pixels_C)
    if not rare.logit_adjustment or not total:
        return None
    return [rare.logit_adjustment * math.log(max(n, 1) / total) for n in pixels_C]
