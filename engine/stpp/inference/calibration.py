"""Calibration of a network's confidence on held-out labels: accuracy by confidence, and the confidence
threshold for a target precision.

Legend: N images, C classes (of the prediction), B bins of the confidence, H W size of the image.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stpp import distributed, files
from stpp.config import DataConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.masks import IGNORE
from stpp.images.pixels import NOT_FINITE
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.loading import loader
from stpp.loading.native import native_batches
from stpp.loading.sample import Sample

NAME, FORMAT = "calibration.json", "stpp-calibration-2"
BINS = 1000
"""Confidence bins, of equal width: thresholds are multiples of 0.001."""
ECE_BINS = 15
"""Bins of the expected calibration error, the usual number."""
FEW_PIXELS = 1000
"""Minimum predicted pixels for a class to have its own threshold."""
NEVER = 2.0
"""Threshold of a class that reaches the precision at no confidence."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Confidence threshold for a target precision."""

    confidence: float
    """Threshold; if none reaches the precision, the one that comes closest."""
    coverage: float
    """Share of the pixels at or above the threshold."""
    precision: float
    """Share of these pixels that are right."""
    reached: bool
    few: bool
    """True if there are too few pixels for an estimate."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Histogram of held-out pixels by predicted class, confidence and correctness."""

    classes: tuple[str, ...]
    all_CB: np.ndarray
    """int64: labelled pixels predicted as this class with a confidence in this bin."""
    right_CB: np.ndarray
    """int64: those of them whose label is this class."""
    images: int
    tta: str
    """Test-time augmentation: key of `views.VIEWS`."""
    network: str
    """See `stpp.inference.protocol.Identity.network`."""
    held_out: str
    """See `digest`."""

    def proposal(self, precision: float, class_id: int | None = None) -> Proposal:
        """Finds the lowest threshold with the target precision, over all pixels or those predicted as one
        class."""
        counted_B, right_B = self._of(class_id)
        total = int(counted_B.sum())
        from_B, right_from_B = (column[::-1].cumsum()[::-1] for column in (counted_B, right_B))
        precision_B = right_from_B / np.maximum(from_B, 1)
        few = total < FEW_PIXELS
        # A few top pixels may be right by chance: at least a hundredth of the pixels must remain.
        enough_B = from_B >= max(1, total / 100)
        good = np.flatnonzero((precision_B >= precision) & enough_B)
        place = int(good[0]) if len(good) else int(np.where(enough_B, precision_B, -1.0).argmax())
        return Proposal(confidence=place / BINS, coverage=float(from_B[place] / max(total, 1)), few=few,
                        precision=float(precision_B[place]), reached=bool(len(good)))

    def floors(self, precision: float) -> tuple[float, ...]:
        """Confidence threshold of every class for the target precision.

        A class with too few predicted pixels gets the threshold of all pixels. A class that never reaches the
        precision gets `NEVER`: its pixels are ignored, not given to other classes.
        """
        overall = self.proposal(precision)
        thresholds = []
        for class_id in range(len(self.classes)):
            own = self.proposal(precision, class_id)
            proposal = overall if own.few else own
            thresholds.append(proposal.confidence if proposal.reached else NEVER)
        return tuple(thresholds)

    def curve(self, class_id: int | None = None, points: int = 100) -> list[tuple[float, float, float]]:
        """Points (threshold, coverage, precision) at rising thresholds; empty if nothing was predicted."""
        counted_B, right_B = self._of(class_id)
        if not counted_B.any():
            return []
        from_B, right_from_B = (column[::-1].cumsum()[::-1] for column in (counted_B, right_B))
        places = np.unique(np.linspace(0, BINS - 1, points).round().astype(int))
        return [(place / BINS, float(from_B[place] / from_B[0]), float(right_from_B[place] / from_B[place]))
                for place in places.tolist() if from_B[place]]

    def error(self, class_id: int | None = None) -> float | None:
        """Expected calibration error: mean over pixels of |accuracy - confidence| in their bin, of 15 bins;
        None if nothing was predicted.

        Source: "On Calibration of Modern Neural Networks" (arXiv 1706.04599), equation 3.
        """
        counted_B, right_B = self._of(class_id)
        if not counted_B.any():
            return None
        centres_B = (np.arange(BINS) + 0.5) / BINS
        coarse_B = np.minimum((centres_B * ECE_BINS).astype(int), ECE_BINS - 1)
        right, confidence = (np.bincount(coarse_B, weights=values, minlength=ECE_BINS)
                             for values in (right_B, counted_B * centres_B))
        return float(np.abs(right - confidence).sum() / counted_B.sum())

    def accuracy(self, class_id: int | None = None) -> float | None:
        """Share of correctly predicted pixels; None if nothing was predicted."""
        counted_B, right_B = self._of(class_id)
        return float(right_B.sum() / counted_B.sum()) if counted_B.any() else None

    def _of(self, class_id: int | None) -> tuple[np.ndarray, np.ndarray]:
        if class_id is None:
            return self.all_CB.sum(0), self.right_CB.sum(0)
        return self.all_CB[class_id], self.right_CB[class_id]


def class_and_bin(sums_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted class of every pixel, and bin of its confidence (share of the summed probabilities): int64
    [N, H, W] each."""
    most_NHW, masks_NHW = sums_NCHW.max(1)
    shares_NHW = (most_NHW / sums_NCHW.sum(1)).nan_to_num(0, 0, 0)
    return masks_NHW, (shares_NHW * BINS).long().clamp(0, BINS - 1)


def count_pixels(masks_NHW: torch.Tensor, bins_NHW: torch.Tensor, where_NHW: torch.Tensor,
                 num_classes: int, num_bins: int = BINS) -> torch.Tensor:
    """Counts pixels by class and bin where a flag is set: int64 [C, B]."""
    places = (masks_NHW * num_bins + bins_NHW)[where_NHW]
    return torch.bincount(places, minlength=num_classes * num_bins).view(num_classes, num_bins)


@torch.inference_mode()
def measure(predictor: Predictor, samples: Sequence[Sample], world: World, data: DataConfig, *, tta: str,
            classes: Sequence[str], network: str) -> Calibration:
    """Measures a calibration on held-out samples, each on one rank; the result is the same on every rank.

    Args:
        samples: each with a mask.
        tta: test-time augmentation; must be that of the labelling that uses the confidences.

    Raises:
        UserError: no pixel has a label, or the network's answer is not finite.
    """
    size = predictor.num_classes
    counts_2CB = torch.zeros(2, size, BINS, dtype=torch.int64, device=world.device)
    broken = torch.zeros((), dtype=torch.int64, device=world.device)
    share, threads = loader.native_share(samples, world), distributed.threads_per_rank(world, data.threads)
    for batch in native_batches(samples, share, device=world.device, loader=data.loader, threads=threads):
        sums_NCHW = views.accumulate(predictor, batch.images_NCHW, tta)
        broken += (~sums_NCHW.isfinite().flatten(1).all(1)).sum()
        masks_NHW, bins_NHW = class_and_bin(views.resize_sums(sums_NCHW, batch.labels_NHW.shape[-2:]))
        labelled_NHW = batch.labels_NHW != IGNORE
        right_NHW = labelled_NHW & (masks_NHW == batch.labels_NHW)
        counts_2CB[0] += count_pixels(masks_NHW, bins_NHW, labelled_NHW, size)
        counts_2CB[1] += count_pixels(masks_NHW, bins_NHW, right_NHW, size)
    all_CB, right_CB = distributed.sum_over_ranks(counts_2CB).cpu().numpy()
    if count := int(distributed.sum_over_ranks(broken)):
        raise UserError(f"{NOT_FINITE} for {count} of {len(samples)} held-out images: there is no confidence "
                        "to calibrate")
    if not all_CB.any():
        raise UserError("no pixel of the held-out images has a label: there is nothing to calibrate on")
    return Calibration(classes=tuple(classes), all_CB=all_CB, right_CB=right_CB, images=len(samples), tta=tta,
                       network=network, held_out=digest(samples))


def digest(samples: Sequence[Sample]) -> str:
    """Digest of a list of images, independent of their order."""
    return hashlib.sha256("\n".join(sorted(sample.key for sample in samples)).encode()).hexdigest()[:16]


def write(path: Path, calibration: Calibration, precisions: Sequence[float]) -> None:
    """Writes a calibration, with its proposals for some precisions, as JSON."""
    ids = range(len(calibration.classes))

    def figures(class_id: int | None) -> dict:
        counts_B, _ = calibration._of(class_id)
        return {"pixels": int(counts_B.sum()), "accuracy": calibration.accuracy(class_id),
                "expected_calibration_error": calibration.error(class_id),
                "proposals": {f"{precision:g}": vars(calibration.proposal(precision, class_id))
                              for precision in precisions}}

    files.write_json(path, {
        "format": FORMAT, "network": calibration.network, "tta": calibration.tta,
        "images": calibration.images, "held_out": calibration.held_out, "all": figures(None),
        "classes": {name: figures(i) for i, name in enumerate(calibration.classes)},
        "bins": {"predicted": [calibration.all_CB[i].tolist() for i in ids],
                 "right": [calibration.right_CB[i].tolist() for i in ids]}})


def read(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UserError: the file is missing, damaged, or not a calibration.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        counts = [np.array(values["bins"][name], dtype=np.int64) for name in ("predicted", "right")]
        if any(count_CB.shape != (len(values["classes"]), BINS) for count_CB in counts):
            raise ValueError("its bins")
        return Calibration(classes=tuple(values["classes"]), all_CB=counts[0], right_CB=counts[1],
                           images=values["images"], tta=values["tta"], network=values["network"],
                           held_out=values["held_out"])
    except FileNotFoundError:
        raise UserError(f"{path}: there is no calibration; `stpp calibrate --checkpoint` makes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a calibration of this version ({error}); make a new one with `stpp "
                        "calibrate`") from None
