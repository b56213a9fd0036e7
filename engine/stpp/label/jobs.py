"""What is computed of a batch and kept of an image: a pseudo label, or a score of reliability.

Legend: N images, C classes, H W size of the batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from stpp.clock import Clock
from stpp.device import Readback
from stpp.images.batches import Batch
from stpp.images.batching import Planned
from stpp.images.masks import IGNORE
from stpp.inference import views
from stpp.inference.open import Teacher
from stpp.label import confidence_map, rows
from stpp.label.sinks import Sink, Stored, open_sink
from stpp_kernels import confusion, finalize, pairwise_iou, upsample_argmax

NOT_FINITE = "the network's answer is not finite"


class Job(Protocol):
    """Work on every image of a corpus."""

    folder: str
    """Where the parts of its table lie below the output."""
    columns: dict[str, str]
    """Of that table."""
    teacher: str
    """Identity of the network or networks."""
    networks: Sequence[Teacher]
    """What computes."""
    settings: dict
    """What decides the result, for the fingerprint: JSON values."""

    def compute(self, batch: Batch) -> Callable[[], list[Any]]:
        """Queues the work on a batch.

        Returns:
            What waits for it, and returns what becomes of each image that is no blank (None for a blank), on the CPU. It
            holds no memory of the device.
        """
        ...

    def sink(self, out: Path, shard: int, clock: Clock) -> Sink | None:
        """Where the masks of a shard go, if there are masks."""
        ...

    def row(self, one: Planned, result: Any, stored: Stored | None) -> dict:
        """The row of a good image."""
        ...


@dataclass(frozen=True, slots=True)
class Labelled:
    """The pseudo label of an image."""

    mask_HW: np.ndarray
    """uint8 class indices; 255 where the confidence is below the floor."""
    mean_confidence: float
    """Of all pixels, those below the floor too."""
    class_pixels: list[int]
    """Pixels of each class in the mask."""
    confidence_map: bytes
    """See stpp.label.confidence_map."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Pseudo labels of one teacher."""

    network: Teacher
    teacher: str
    mode: str
    """Views: key of `views.VIEWS`."""
    min_confidence: float
    """Pixels whose class has a smaller share of the summed probabilities become 255."""
    output: str
    """ "png" or "tar"."""
    folder = "labels"
    columns = rows.LABELS

    @property
    def networks(self) -> Sequence[Teacher]:
        """See `Job`."""
        return [self.network]

    @property
    def settings(self) -> dict:
        """See `Job`."""
        return {"job": "label", "teacher": self.teacher, "tta": self.mode, "min_confidence": self.min_confidence,
                "output": self.output}

    def compute(self, batch: Batch) -> Callable[[], list[Labelled | str | None]]:
        """See `Job`; a text is why an image has no label although it could be read."""
        sums_NCHW = views.accumulate(self.network.logits, batch.images_NCHW, self.mode, self.network.num_classes)
        queued, errors = self._queued(sums_NCHW), batch.errors

        def results() -> list[Labelled | str | None]:
            return [None if i in errors else label for i, label in enumerate(_labels(*queued.read()))]

        return results

    def _queued(self, sums_NCHW: torch.Tensor) -> Readback:
        """Masks, mean confidences, pixels by class and maps of confidence, on their way to the host."""
        masks_NHW, confidence_N, pixels_NC = finalize(sums_NCHW)
        if self.min_confidence > 0:
            unsure_NHW = sums_NCHW.amax(1) < self.min_confidence * sums_NCHW.sum(1)
            masks_NHW = masks_NHW.masked_fill(unsure_NHW, IGNORE)
            # A mask against itself counts its classes in one pass.
            pixels_NCC = confusion(masks_NHW, masks_NHW, self.network.num_classes, per_image=True)
            pixels_NC = pixels_NCC.diagonal(dim1=1, dim2=2)
        return Readback(masks_NHW, confidence_N, pixels_NC, confidence_map.sampled(sums_NCHW))

    def sink(self, out: Path, shard: int, clock: Clock) -> Sink:
        return open_sink(self.output, out, shard, clock)

    def row(self, one: Planned, result: Labelled, stored: Stored) -> dict:
        height, width = one.size
        return _row(one, self.teacher) | {
            "mean_confidence": result.mean_confidence, "ignored_fraction": 1 - sum(result.class_pixels) / (height * width),
            "class_pixels": result.class_pixels, "confidence_map": result.confidence_map, "size": stored.size, "crc": stored.crc}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Agreement of the last of several teachers with each earlier one.

    Source: ST++ (arXiv 2106.05095), section 3.3.
    """

    networks: Sequence[Teacher]
    teacher: str
    folder = "scores"
    columns = rows.SCORES

    @property
    def settings(self) -> dict:
        """See `Job`."""
        return {"job": "select", "teacher": self.teacher}

    def compute(self, batch: Batch) -> Callable[[], list[float | None]]:
        """See `Job`: the mean over the earlier teachers of their mask's mean IoU with the last one's."""
        *earlier, last = self.networks
        size = batch.images_NCHW.shape[-2:]
        reference_NHW = self._masks(last, batch, size)
        total_N = torch.zeros(len(batch.planned), dtype=torch.float64, device=reference_NHW.device)
        for network in earlier:
            total_N += pairwise_iou(self._masks(network, batch, size), reference_NHW, last.num_classes)
        queued, errors = Readback(total_N / len(earlier)), batch.errors

        def results() -> list[float | None]:
            (scores_N,) = queued.read()
            return [None if i in errors else score for i, score in enumerate(scores_N.tolist())]

        return results

    def _masks(self, network: Teacher, batch: Batch, size: torch.Size) -> torch.Tensor:
        """uint8 [N, H, W]."""
        return upsample_argmax(network.logits(batch.images_NCHW), size)

    def sink(self, out: Path, shard: int, clock: Clock) -> None:
        return None

    def row(self, one: Planned, result: float, stored: None) -> dict:
        return _row(one, self.teacher) | {"reliability": result}


def _labels(masks_NHW: torch.Tensor, confidence_N: torch.Tensor, pixels_NC: torch.Tensor,
            maps_Nrc: torch.Tensor) -> Iterator[Labelled | str]:
    """What becomes of each image, from results on the CPU."""
    columns = masks_NHW.numpy(), confidence_N.tolist(), pixels_NC.tolist(), maps_Nrc.numpy()
    for mask_HW, confidence, pixels, map_rc in zip(*columns, strict=True):
        known = math.isfinite(confidence)
        yield Labelled(mask_HW, confidence, pixels, map_rc.tobytes()) if known else NOT_FINITE


def bad_row(one: Planned, error: str, columns: dict[str, str], teacher: str) -> dict:
    """The row of an image that could not be labelled."""
    return dict.fromkeys(columns) | _row(one, teacher) | {"status": "bad", "error": error}


def _row(one: Planned, teacher: str) -> dict:
    return {"key": one.item.key, "source": one.item.source, "status": "ok", "error": None,
            "width": one.header and one.header.width, "height": one.header and one.header.height, "teacher": teacher}
