"""Calibration of a network's confidence on labels that it was not trained on: how often a pixel of a
confidence is right, and from which confidence on a wanted precision holds.

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
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.loading import loader
from stpp.loading.native import native_batches
from stpp.loading.sample import Sample

NAME, FORMAT = "calibration.json", "stpp-calibration-1"
BINS = 1000
"""Bins of the confidence, of equal width: thresholds are thousandths."""
ECE_BINS = 15
"""Bins of the expected calibration error, as is usual."""
FEW_PIXELS = 1000
"""A class that is predicted for fewer pixels has no threshold of its own."""
NEVER = 2.0
"""In the place of a threshold: no confidence suffices."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The least confidence for a wanted precision."""

    confidence: float
    """Where no confidence reaches the precision: the one that comes closest."""
    coverage: float
    """Share of the pixels that are at least so confident."""
    precision: float
    """Share of these that are right."""
    reached: bool
    few: bool
    """Too few pixels to tell."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Pixels of held-out labels by what was predicted, how confidently, and whether it is right."""

    classes: tuple[str, ...]
    all_CB: np.ndarray
    """int64: labelled pixels that were predicted as this class with a confidence in this bin."""
    right_CB: np.ndarray
    """int64: those whose label it is."""
    images: int
    tta: str
    """Views: key of `views.VIEWS`."""
    weights: str
    """See `stpp.inference.record.weights_sha256`."""
    held_out: str
    """See `digest`."""

    def proposal(self, precision: float, class_id: int | None = None) -> Proposal:
        """The least confidence from which on pixels have the wanted precision: of all, or of those predicted
        as one class."""
        counted_B, right_B = self._of(class_id)
        total = int(counted_B.sum())
        from_B, right_from_B = (column[::-1].cumsum()[::-1] for column in (counted_B, right_B))
        precision_B = right_from_B / np.maximum(from_B, 1)
        few = total < FEW_PIXELS
        # The last pixels of a class may be right by chance: a hundredth of them has to be left.
        enough_B = from_B >= max(1, total / 100)
        good = np.flatnonzero((precision_B >= precision) & enough_B)
        place = int(good[0]) if len(good) else int(np.where(enough_B, precision_B, -1.0).argmax())
        return Proposal(confidence=place / BINS, coverage=float(from_B[place] / max(total, 1)), few=few,
                        precision=float(precision_B[place]), reached=bool(len(good)))

    def floors(self, precision: float) -> tuple[float, ...]:
        """Least confidence of every class for the wanted precision.

        A class that is predicted for too few pixels has that of all pixels; one that reaches the precision
        nowhere is not labelled (`NEVER`): its pixels are left out, not given to others.
        """
        overall = self.proposal(precision)
        found = []
        for class_id in range(len(self.classes)):
            own = self.proposal(precision, class_id)
            one = overall if own.few else own
            found.append(one.confidence if one.reached else NEVER)
        return tuple(found)

    def curve(self, class_id: int | None = None, points: int = 100) -> list[tuple[float, float, float]]:
        """(least confidence, coverage, precision) at rising confidences; none where nothing was predicted."""
        counted_B, right_B = self._of(class_id)
        if not counted_B.any():
            return []
        from_B, right_from_B = (column[::-1].cumsum()[::-1] for column in (counted_B, right_B))
        places = np.unique(np.linspace(0, BINS - 1, points).round().astype(int))
        return [(place / BINS, float(from_B[place] / from_B[0]), float(right_from_B[place] / from_B[place]))
                for place in places.tolist() if from_B[place]]

    def error(self, class_id: int | None = None) -> float | None:
        """Expected calibration error: the mean over pixels of |accuracy - confidence| of their bin, of 15;
        None where nothing was predicted.

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
        """Share of the pixels that are right."""
        counted_B, right_B = self._of(class_id)
        return float(right_B.sum() / counted_B.sum()) if counted_B.any() else None

    def _of(self, class_id: int | None) -> tuple[np.ndarray, np.ndarray]:
        if class_id is None:
            return self.all_CB.sum(0), self.right_CB.sum(0)
        return self.all_CB[class_id], self.right_CB[class_id]


def binned(sums_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Class of every pixel and the bin of its confidence (its share of the summed probabilities): int64
    [N, H, W] each."""
    most_NHW, masks_NHW = sums_NCHW.max(1)
    shares_NHW = (most_NHW / sums_NCHW.sum(1)).nan_to_num(0, 0, 0)
    return masks_NHW, (shares_NHW * BINS).long().clamp(0, BINS - 1)


def counted(masks_NHW: torch.Tensor, bins_NHW: torch.Tensor, where_NHW: torch.Tensor,
            num_classes: int) -> torch.Tensor:
    """Pixels by class and bin where a flag is set: int64 [C, B]."""
    places = (masks_NHW * BINS + bins_NHW)[where_NHW]
    return torch.bincount(places, minlength=num_classes * BINS).view(num_classes, BINS)


@torch.inference_mode()
def measure(predictor: Predictor, samples: Sequence[Sample], here: World, data: DataConfig, *, tta: str,
            classes: Sequence[str], weights: str) -> Calibration:
    """Counts the pixels of held-out samples, every image once over all ranks; the same on every rank.

    Args:
        samples: each with a mask.
        tta: views of an image: confidences are those of a labelling with the same views.

    Raises:
        UserError: no pixel has a label.
    """
    size = predictor.num_classes
    counts_2CB = torch.zeros(2, size, BINS, dtype=torch.int64, device=here.device)
    share, threads = loader.native_share(samples, here), distributed.threads_per_rank(here, data.threads)
    for batch in native_batches(samples, share, device=here.device, loader=data.loader, threads=threads):
        sums_NCHW = views.accumulate(predictor, batch.images_NCHW, tta)
        masks_NHW, bins_NHW = binned(views.resized(sums_NCHW, batch.labels_NHW.shape[-2:]))
        labelled_NHW = batch.labels_NHW != IGNORE
        counts_2CB[0] += counted(masks_NHW, bins_NHW, labelled_NHW, size)
        counts_2CB[1] += counted(masks_NHW, bins_NHW, labelled_NHW & (masks_NHW == batch.labels_NHW), size)
    all_CB, right_CB = distributed.sum_over_ranks(counts_2CB).cpu().numpy()
    if not all_CB.any():
        raise UserError("no pixel of the held-out images has a label: there is nothing to calibrate on")
    return Calibration(classes=tuple(classes), all_CB=all_CB, right_CB=right_CB, images=len(samples), tta=tta,
                       weights=weights, held_out=digest(samples))


def digest(samples: Sequence[Sample]) -> str:
    """Name of a list of images, whatever their order."""
    return hashlib.sha256("\n".join(sorted(sample.key for sample in samples)).encode()).hexdigest()[:16]


def write(path: Path, found: Calibration, wanted: Sequence[float]) -> None:
    """Writes a calibration, with what it says of some precisions, as JSON."""
    ids = range(len(found.classes))

    def figures(class_id: int | None) -> dict:
        counts_B, _ = found._of(class_id)
        return {"pixels": int(counts_B.sum()), "accuracy": found.accuracy(class_id),
                "expected_calibration_error": found.error(class_id),
                "proposals": {f"{one:g}": vars(found.proposal(one, class_id)) for one in wanted}}

    files.write_json(path, {
        "format": FORMAT, "weights_sha256": found.weights, "tta": found.tta, "images": found.images,
        "held_out": found.held_out, "all": figures(None),
        "classes": {name: figures(i) for i, name in enumerate(found.classes)},
        "bins": {"predicted": [found.all_CB[i].tolist() for i in ids],
                 "right": [found.right_CB[i].tolist() for i in ids]}})


def read(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        UserError: missing, damaged, or of something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        counts = [np.array(values["bins"][name], dtype=np.int64) for name in ("predicted", "right")]
        if any(one.shape != (len(values["classes"]), BINS) for one in counts):
            raise ValueError("its bins")
        return Calibration(classes=tuple(values["classes"]), all_CB=counts[0], right_CB=counts[1],
                           images=values["images"], tta=values["tta"], weights=values["weights_sha256"],
                           held_out=values["held_out"])
    except FileNotFoundError:
        raise UserError(f"{path}: there is no calibration; `stpp calibrate --checkpoint` makes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a calibration of this version ({error}); `stpp calibrate` makes it "
                        "anew") from None
