"""Intersection over union from a confusion matrix."""

import torch


def iou_per_class(confusion: torch.Tensor) -> torch.Tensor:
    """Computes the IoU of each class.

    Args:
        confusion: int64 [C, C], rows truth, columns prediction, in pixels.

    Returns:
        float64 [C] in 0..1; NaN for a class that occurs neither in truth nor in prediction.
    """
    confusion = confusion.double()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return torch.where(union > 0, hit / union.clamp(min=1), torch.nan)


def mean_iou(confusion: torch.Tensor) -> float:
    """Computes the mean IoU, in percent, over classes in truth or prediction; NaN for an empty matrix."""
    return 100 * iou_per_class(confusion).nanmean().item()
