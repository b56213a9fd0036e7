"""ST++'s selection of reliable images: unlabelled images on which several checkpoints agree.

Source: ST++ (arXiv 2106.05095), section 3.3. Legend: N images, H W size of the batch.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from stpp import files
from stpp.clock import Clock
from stpp.config import DataConfig, LabelConfig
from stpp.device import Readback
from stpp.distributed import World
from stpp.images.batches import Decoded
from stpp.images.pixels import NOT_FINITE
from stpp.images.planning import Planned
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.inference.predictors import PredictorOpener
from stpp.label import rows
from stpp.label.assignment import Assignment
from stpp.label.labels import SampleSource, require_none_bad
from stpp.label.plan import Plan
from stpp.label.run import Summary, execute
from stpp.loading.sample import Sample
from stpp_kernels import class_pixels, pairwise_iou

PRESENT = 0.001
"""Minimum share of an image's pixels for the image to show a class."""


class ImageReliability(NamedTuple):
    """Reliability of an image."""

    reliability: float
    class_pixels: list[int] | None
    """Pixels of each class in the last teacher's mask; None if not needed."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityJob:
    """Job that scores the agreement of the last of several teachers with each earlier one.

    Source: ST++ (arXiv 2106.05095), section 3.3.
    """

    networks: Sequence[Predictor]
    teacher: str
    classes = ()
    by_class: bool = False
    """Keep the class pixels of each image, for a selection by class."""

    @property
    def settings(self) -> dict:
        """See `Job`."""
        by_class = {"select_by": "class"} if self.by_class else {}
        return {"job": "select", "teacher": self.teacher, **by_class}

    def prepare(self, task: Assignment, plan: Plan, world: World) -> None:
        """See `Job`."""

    def prepared(self, out: Path) -> "ReliabilityJob":
        """See `Job`."""
        return self

    def compute(self, batch: Decoded) -> Callable[[], list[ImageReliability | str | None]]:
        """See `Job`: computes the last teacher's mean IoU with each earlier teacher, averaged over these."""
        *earlier, last = self.networks
        reference_NHW, finite_N = views.finite_masks(last, batch.images_NCHW, "none")
        total_N = torch.zeros(len(batch.planned), dtype=torch.float64, device=reference_NHW.device)
        for network in earlier:
            masks_NHW, finite = views.finite_masks(network, batch.images_NCHW, "none")
            finite_N = finite_N & finite
            total_N += pairwise_iou(masks_NHW, reference_NHW, last.num_classes)
        total_N.masked_fill_(~finite_N, math.nan)  # equal masks of NaN would be the most reliable
        counts = []
        if self.by_class:
            counts = [class_pixels(reference_NHW, last.num_classes, per_image=True)]
        queued, errors = Readback(total_N / len(earlier), *counts), batch.errors

        def results() -> list[ImageReliability | str | None]:
            scores_N, *counts = (values.tolist() for values in queued.read())
            pixels = counts[0] if counts else [None] * len(scores_N)
            return [None if i in errors else NOT_FINITE if math.isnan(both[0]) else ImageReliability(*both)
                    for i, both in enumerate(zip(scores_N, pixels, strict=True))]

        return results

    def sink(self, out: Path, shard: int, clock: Clock) -> None:
        """See `Job`."""

    def row(self, planned: Planned, result: ImageReliability, stored: None) -> dict:
        """See `Job`."""
        return rows.good(planned, self.teacher) | result._asdict()


def select_corpus(open_teachers: PredictorOpener, task: Assignment, world: World, *,
                  order: Sequence[str] | None = None) -> Summary:
    """Splits a corpus into a reliable half and the rest; with `select_by` class, half of each class's images.

    Writes `reliability.parquet`, `reliable_ids.txt` and `unreliable_ids.txt`. Reliability is the mean IoU of
    the last teacher's prediction with each earlier teacher's. Shards, markers and resuming work as in
    `stpp.label.labels.label_corpus`; the table's parts are `scores/part-*.parquet`.

    Args:
        open_teachers: opens checkpoints of one run in the order of training; the last one is the reference.
        task: with the table "scores".
        order: keys of the images in the order that ties keep; None: the order of the source.
    """
    def job(images: int) -> ReliabilityJob:
        opened = open_teachers(images)
        return ReliabilityJob(networks=[teacher.network for teacher in opened], by_class=by_class,
                              teacher="+".join(teacher.identity for teacher in opened))

    by_class = task.config.select_by == "class"
    return execute(task, job, world, conclude=lambda: write_selection(task.out, order, by_class=by_class))


def select(open_teachers: PredictorOpener, samples: Sequence[Sample], lines: Sequence[str], world: World, *,
           config: LabelConfig, data: DataConfig, out: Path, title: str = "select") -> float:
    """Selects the reliable samples of a stage with `select_corpus`.

    Args:
        lines: lines of the unlabelled list, copied to the id files.

    Returns:
        Mean reliability.

    Raises:
        UserError: an image cannot be read.
    """
    task = Assignment(source=SampleSource(samples, lines), out=out, config=config, data=data, title=title,
                      table="scores")
    summary = select_corpus(open_teachers, task, world, order=[sample.key for sample in samples])
    require_none_bad(summary, out)
    return summary.mean


def split_by_reliability(scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """Splits positions into the reliable half (rounded down, most reliable first) and the rest; ties keep
    their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    half = len(scores) // 2
    return order[:half], order[half:]


def split_by_class(scores: Sequence[float], pixels: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Splits positions as `split_by_reliability`, but within each class. An image belongs to the rarest class
    that it shows: the class shown by the fewest images (of equal ones, the first).

    Half of each class's images, rounded down, are reliable. To reach half of all images, the next ones of
    classes with an odd number of images are added, most reliable first.

    Args:
        pixels: pixels of each class, image by image.
    """
    present = [[i for i, count in enumerate(counts) if count >= PRESENT * sum(counts) and count]
             for counts in pixels]
    images = Counter(i for classes in present for i in classes)
    groups: dict[int, list[int]] = {}
    for position in sorted(range(len(scores)), key=lambda i: -scores[i]):
        rarest = min(present[position], key=lambda i: (images[i], i), default=-1)
        groups.setdefault(rarest, []).append(position)
    chosen = {position for group in groups.values() for position in group[: len(group) // 2]}
    middles = sorted((group[len(group) // 2] for group in groups.values() if len(group) % 2),
                     key=lambda i: (-scores[i], i))
    chosen.update(middles[: len(scores) // 2 - len(chosen)])
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [i for i in order if i in chosen], [i for i in order if i not in chosen]


def write_selection(out: Path, order: Sequence[str] | None = None, *, by_class: bool = False) -> None:
    """Writes the table and the two lists from the scores of all shards; images without a score are in
    neither.

    Holds the names of all images in memory, about 200 bytes each.
    """
    scored = [(row["key"], row["source"], row["reliability"], row.get("class_pixels"))
              for row in rows.read_parts(out, "scores") if row["status"] == "ok"]
    if order is not None:
        place = {key: i for i, key in enumerate(order)}
        scored.sort(key=lambda row: place[row[0]])
    scores = [row[2] for row in scored]
    reliable, unreliable = split_by_class(scores, [row[3] for row in scored]) if by_class \
        else split_by_reliability(scores)
    trusted = set(reliable)
    rows.write(out / "reliability.parquet", ({"key": key, "reliability": score, "reliable": i in trusted}
                                             for i, (key, _, score, _) in enumerate(scored)),
               rows.RELIABILITY)
    for name, positions in (("reliable_ids.txt", reliable), ("unreliable_ids.txt", unreliable)):
        files.write_text(out / name, "".join(f"{scored[i][1]}\n" for i in positions))
