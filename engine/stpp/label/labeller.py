"""Pseudo labels: of a corpus, and of the samples of a self-training stage."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from stpp import distributed
from stpp.config import DataConfig, LabelConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.batching import Cut
from stpp.images.masks import read_index_mask
from stpp.images.sources import Source
from stpp.inference.several import Open, Opened
from stpp.label import rows
from stpp.label.jobs import Labels
from stpp.label.labels import SampleSource
from stpp.label.run import Summary, Task, execute
from stpp.label.shards import WHOLE, Part
from stpp.loading.sample import Sample
from stpp.metrics import mean_iou
from stpp_kernels import confusion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """What labelling the samples of a stage ended with."""

    images: int
    miou: float | None
    """Agreement with the masks of the images, percent, where all of them have one: reported, never trained on."""


def label_corpus(open_teacher: Open, source: Source, here: World, *, config: LabelConfig, data: DataConfig, out: Path,
                 output: str = "png", part: Part = WHOLE, verify: bool = False, list_only: bool = False,
                 title: str = "label") -> Summary:
    """Writes a mask (8-bit class indices, 255 below the confidence floor) of every image, and the rows that describe it.

    Below `out`: `masks/<key>.png` or `masks/shard-*.tar`, `labels/part-*.parquet` (columns: `rows.LABELS`), at the end
    `failed.parquet` and `summary.json`; `run.json`, `plan/` and `shards/` are the run's own. The same call continues what
    was interrupted, on any number of ranks, and ends with the same bytes.

    Args:
        open_teacher: opens one teacher.
        data: who decodes, with how many threads, and whether EXIF counts; the rest is not looked at.
        output: "png" or "tar".

    Raises:
        UserError: the source, or an output that another run began.
        OSError: the output cannot be written.
    """
    def job(images: int) -> Labels:
        (opened,) = open_teacher(images)
        return Labels(network=opened.network, teacher=opened.identity, mode=config.tta, output=output,
                      min_confidence=config.min_confidence)

    return execute(Task(source=source, open_job=job, cut=cut(config, data), shard_size=config.shard_size, out=out, title=title,
                        loader=data.loader, threads=data.threads, part=part, verify=verify, list_only=list_only),
                   here)


def label(open_teacher: Open, samples: Sequence[Sample], here: World, *, config: LabelConfig, data: DataConfig, out: Path,
          title: str) -> Labelled:
    """Labels the samples of a stage with `label_corpus`.

    Raises:
        UserError: an image cannot be labelled; training would miss its mask.
    """
    classes = []

    def opened(images: int) -> list[Opened]:
        found = open_teacher(images)
        classes.append(found[0].network.num_classes)
        return found

    summary = label_corpus(opened, SampleSource(samples), here, config=config, data=data, out=out, title=title)
    require_none_bad(summary, out)
    return Labelled(images=summary.images, miou=agreement(samples, out, here, classes[0]))


def cut(config: LabelConfig, data: DataConfig) -> Cut:
    """How the settings cut shards into batches."""
    return Cut(max_batch=config.batch_per_rank, batch_pixels=config.batch_pixels, max_pixels=config.max_pixels,
               exif=data.exif)


def require_none_bad(summary: Summary, out: Path) -> None:
    """Refuses to go on with a list of which some images could not be used.

    Raises:
        UserError: names the first of them.
    """
    if summary.bad:
        first = rows.read(out / "failed.parquet")[0]
        raise UserError(f"{summary.bad} images cannot be labelled, the first: {first['source']}: {first['error']}; replace "
                        f"them or take them off the list, and remove {out} (all are in its failed.parquet)")


def agreement(samples: Sequence[Sample], out: Path, here: World, num_classes: int) -> float | None:
    """Mean IoU, percent, of the pseudo labels in `out` with the samples' own masks; None unless all have one."""
    if any(sample.mask is None for sample in samples):
        return None
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for sample in samples[here.rank :: here.size]:
        found, truth = (torch.from_numpy(read_index_mask(path).copy())[None] for path in (out / mask_name(sample), sample.mask))
        counted = torch.where(found == 255, 255, truth)
        matrix += confusion(found.clamp(max=num_classes - 1), counted, num_classes)
    return mean_iou(distributed.sum_over_ranks(matrix.to(here.device)).cpu())


def mask_name(sample: Sample) -> str:
    """Path of a sample's pseudo label below the folder of its labelling."""
    return f"masks/{sample.key}.png"
