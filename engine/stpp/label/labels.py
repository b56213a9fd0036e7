"""Pseudo labelling of a corpus, and of the samples of a self-training stage.

Legend: N images, C classes, H W size of the batch.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stpp import distributed
from stpp.clock import Clock
from stpp.config import DataConfig, LabelConfig
from stpp.device import Readback, constant
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.batches import Decoded
from stpp.images.items import Item, SkippedItems
from stpp.images.masks import IGNORE, read_index_mask
from stpp.images.pixels import NOT_FINITE
from stpp.images.planning import Planned
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.inference.predictors import OpenedPredictor, PredictorOpener
from stpp.label import confidence_map, rows, thresholds
from stpp.label.assignment import Assignment
from stpp.label.plan import Plan
from stpp.label.run import Summary, execute
from stpp.label.sinks import Sink, StoredMask, open_sink
from stpp.loading.sample import Sample
from stpp.metrics import mean_iou
from stpp_kernels import class_pixels, confusion


@dataclass(frozen=True, slots=True)
class PseudoLabel:
    """Pseudo label of an image."""

    mask_HW: np.ndarray
    """uint8 class indices; 255 where the confidence is below the floor."""
    mean_confidence: float
    """Mean over all pixels, including those below the floor."""
    class_pixels: list[int]
    """Pixels of each class in the mask."""
    confidence_map: bytes
    """See stpp.label.confidence_map."""


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """Job that writes the pseudo labels of one teacher."""

    network: Predictor
    teacher: str
    mode: str
    """Test-time augmentation: key of `views.VIEWS`."""
    min_confidence: float
    """Confidence threshold (share of the summed probabilities); pixels below it become 255."""
    output: str
    """Mask format, "png" or "tar"."""
    classes: Sequence[str] = ()
    """See `Job`."""
    floors: tuple[float, ...] = ()
    """Confidence threshold of each class; empty: `min_confidence` for all."""
    keep_share: float = 1.0
    """Maximum share of each class's pixels that keep their label; see `stpp.label.thresholds`."""

    @property
    def networks(self) -> Sequence[Predictor]:
        """See `Job`."""
        return [self.network]

    @property
    def settings(self) -> dict:
        """See `Job`."""
        by_class = {"floors": list(self.floors)} if self.floors else {}
        share = {"keep_share": self.keep_share} if self.keep_share < 1 else {}
        return {"job": "label", "teacher": self.teacher, "tta": self.mode, "output": self.output,
                "min_confidence": self.min_confidence, **by_class, **share}

    def prepare(self, task: Assignment, plan: Plan, world: World) -> None:
        """See `Job`."""
        if self.keep_share < 1:
            thresholds.ensure(self.network, self.mode, task, plan, world)

    def prepared(self, out: Path) -> "LabelJob":
        """See `Job`: takes the larger of each class's own floor and the floor of its share."""
        if self.keep_share == 1:
            return self
        of_share = thresholds.read(out)
        own = self.floors or (self.min_confidence,) * len(of_share)
        return dataclasses.replace(self, floors=tuple(map(max, own, of_share)), keep_share=1.0)

    def compute(self, batch: Decoded) -> Callable[[], list[PseudoLabel | str | None]]:
        """See `Job`; a text is the reason why a readable image has no label."""
        sums_NCHW = views.accumulate(self.network, batch.images_NCHW, self.mode)
        queued, errors = self._queued(sums_NCHW, tuple(batch.images_NCHW.shape[-2:])), batch.errors

        def results() -> list[PseudoLabel | str | None]:
            return [None if i in errors else label for i, label in enumerate(_labels(*queued.read()))]

        return results

    def _queued(self, sums_NCHW: torch.Tensor, size: tuple[int, int]) -> Readback:
        """Queues the copy of masks, mean confidences, class pixels and confidence maps to the host."""
        masks_NHW, confidence_N, pixels_NC = views.masks_of_sums(sums_NCHW, size)
        if self.floors or self.min_confidence > 0:
            floor = constant(self.floors, sums_NCHW.device)[masks_NHW.long()] if self.floors \
                else self.min_confidence
            unsure_NHW = views.confidence_of_sums(sums_NCHW, size) < floor
            masks_NHW = masks_NHW.masked_fill(unsure_NHW, IGNORE)
            pixels_NC = class_pixels(masks_NHW, self.network.num_classes, per_image=True)
        return Readback(masks_NHW, confidence_N, pixels_NC, confidence_map.sampled(sums_NCHW, size))

    def sink(self, out: Path, shard: int, clock: Clock) -> Sink:
        """See `Job`."""
        return open_sink(self.output, out, shard, clock)

    def row(self, planned: Planned, result: PseudoLabel, stored: StoredMask) -> dict:
        """See `Job`."""
        height, width = planned.size
        return rows.good(planned, self.teacher) | {
            "mean_confidence": result.mean_confidence,
            "ignored_fraction": 1 - sum(result.class_pixels) / (height * width),
            "class_pixels": result.class_pixels, "confidence_map": result.confidence_map,
            "size": stored.size, "crc": stored.crc}


def _labels(masks_NHW: torch.Tensor, confidence_N: torch.Tensor, pixels_NC: torch.Tensor,
            maps_Nrc: torch.Tensor) -> Iterator[PseudoLabel | str]:
    """Yields the pseudo label, or the error, of each image from results on the CPU."""
    columns = masks_NHW.numpy(), confidence_N.tolist(), pixels_NC.tolist(), maps_Nrc.numpy()
    for mask_HW, confidence, pixels, map_rc in zip(*columns, strict=True):
        finite = math.isfinite(confidence)
        yield PseudoLabel(mask_HW, confidence, pixels, map_rc.tobytes()) if finite else NOT_FINITE


class SampleSource:
    """Source of the samples of a prepared data set, ordered by size so that most batches are full.

    Args:
        lines: lines of the samples in the id files; None: their image paths.
    """

    def __init__(self, samples: Sequence[Sample], lines: Sequence[str] | None = None):
        named_by = zip(samples, lines if lines is not None else [sample.image for sample in samples],
                       strict=True)
        self._samples = sorted(named_by, key=lambda pair: (pair[0].height, pair[0].width))
        self.skipped = SkippedItems()

    def items(self) -> Iterator[Item]:
        """See `Source`."""
        for sample, line in self._samples:
            yield Item(key=sample.key, source=line.rstrip("\n"), file=sample.image)

    def stamp(self) -> dict:
        """See `Source`; samples were checked when they were prepared."""
        digest, keys = hashlib.sha256(), hashlib.sha256()
        for sample, _ in self._samples:
            digest.update(f"{sample.key}\0{sample.image}\n".encode())
            keys.update(f"{sample.key}\n".encode())
        return {"kind": "samples", "files": len(self._samples), "digest": digest.hexdigest(),
                "keys": keys.hexdigest()}


@dataclass(frozen=True, kw_only=True)
class LabelResult:
    """Result of labelling the samples of a stage."""

    images: int
    miou: float | None
    """Mean IoU with the images' masks, in percent, if all have one; reported, never trained on."""
    class_pixels: list[int]
    """Pixels of each class in the labels."""


Floors = Callable[[OpenedPredictor], tuple[float, ...]]
"""Function from an opened teacher to confidence thresholds by class; empty: `LabelConfig.min_confidence`."""


def label_corpus(open_teacher: PredictorOpener, task: Assignment, world: World, *,
                 floors: Floors = lambda _: ()) -> Summary:
    """Writes a mask (8-bit class indices, 255 below the confidence floor) and a row for every image.

    Files below `task.out`: `masks/<key>.png` or `masks/shard-*.tar`, `labels/part-*.parquet`
    (`rows.LABELS`), at the end `failed.parquet` and `summary.json`; `run.json`, `plan/` and `shards/` are
    internal. The same call resumes an interrupted run, on any number of ranks, with identical bytes.

    Args:
        open_teacher: opens one teacher.
        floors: required if `min_confidence` is "auto".

    Raises:
        UserError: the source is invalid, or another run began the output.
        OSError: the output cannot be written.
    """
    def job(images: int) -> LabelJob:
        (opened,) = open_teacher(images)
        threshold, by_class = task.config.min_confidence, floors(opened)
        assert by_class or threshold != "auto"
        return LabelJob(network=opened.network, teacher=opened.identity, mode=task.config.tta,
                        output=task.output, min_confidence=0.0 if threshold == "auto" else threshold,
                        floors=by_class, keep_share=task.config.keep_share, classes=opened.classes)

    return execute(task, job, world)


def label(open_teacher: PredictorOpener, samples: Sequence[Sample], world: World, *, config: LabelConfig,
          data: DataConfig, out: Path, title: str, floors: Floors = lambda _: ()) -> LabelResult:
    """Labels the samples of a stage with `label_corpus`.

    Raises:
        UserError: an image cannot be labelled; training would miss its mask. Or no pixel has a label.
    """
    classes = []

    def opened(images: int) -> list[OpenedPredictor]:
        predictors = open_teacher(images)
        classes.append(predictors[0].network.num_classes)
        return predictors

    task = Assignment(source=SampleSource(samples), out=out, config=config, data=data, title=title)
    summary = label_corpus(opened, task, world, floors=floors)
    require_none_bad(summary, out)
    if not any(summary.class_pixels):
        raise UserError(f"{out}: the teacher is not confident of a single pixel of {summary.images} images, "
                        "so there is nothing to train on: lower --label.min-confidence, or train the teacher "
                        "longer (another --out)")
    return LabelResult(images=summary.images, miou=agreement(samples, out, world, classes[0]),
                       class_pixels=summary.class_pixels)


def require_none_bad(summary: Summary, out: Path) -> None:
    """Raises an error if some images could not be labelled.

    Raises:
        UserError: names the first of them.
    """
    if summary.bad:
        first = rows.read(out / "failed.parquet")[0]
        raise UserError(f"{summary.bad} images cannot be labelled, the first: {first['source']}: "
                        f"{first['error']}; replace them or take them off the list, and remove {out} (its "
                        "failed.parquet lists all)")


def agreement(samples: Sequence[Sample], out: Path, world: World, num_classes: int) -> float | None:
    """Computes the mean IoU, in percent, of the pseudo labels in `out` with the samples' masks; None unless
    all have one, and some labelled pixel has a counted one."""
    if any(sample.mask is None for sample in samples):
        return None
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for sample in samples[world.rank :: world.size]:
        label, truth = (torch.from_numpy(read_index_mask(path, exif=False).copy())[None]
                        for path in (out / mask_name(sample), sample.mask))
        counted = torch.where(label == 255, 255, truth)
        matrix += confusion(label.clamp(max=num_classes - 1), counted, num_classes)
    matrix = distributed.sum_over_ranks(matrix.to(world.device)).cpu()
    return mean_iou(matrix) if matrix.any() else None


def mask_name(sample: Sample) -> str:
    """Path of a sample's pseudo label below the folder of its labelling."""
    return f"masks/{sample.key}.png"
