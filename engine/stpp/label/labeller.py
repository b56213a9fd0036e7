"""Pseudo labels of a list of images: one mask a file, one row a mask.

N images, C classes, H W size of the image.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import distributed, log
from stpp.config import DataConfig, LabelConfig
from stpp.data import loader
from stpp.data.masks import write_index_png
from stpp.data.sample import Sample
from stpp.distributed import World
from stpp.label import rows
from stpp.metrics import mean_iou
from stpp.teacher import tta
from stpp.teacher.engine import Teacher
from stpp_kernels import confusion, finalize


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What labelling a list ended with."""

    images: int
    miou: float | None
    """Agreement with the masks of the images, percent, where all of them have one: reported, never trained on."""


@torch.inference_mode()
def label(teacher: Teacher, samples: Sequence[Sample], here: World, *, config: LabelConfig, data: DataConfig,
          out: Path, title: str) -> Labelled:
    """Writes `out/masks/<key>.png` (8-bit class indices) for every sample and `out/labels.parquet`, a row each.

    Rows: key, mask (path below `out`), width, height, mean_confidence, class_pixels. The Parquet file is written
    last: it exists when every mask does.
    """
    found, writes = [], []
    matrix = torch.zeros(teacher.num_classes, teacher.num_classes, dtype=torch.int64, device=here.device)
    judged = all(sample.mask is not None for sample in samples)
    total, batches = loader.native_batches(samples, here, data, max_batch=config.batch_per_rank)
    threads = distributed.threads_per_rank(here, data.threads)
    with ThreadPoolExecutor(threads) as pool, log.Progress(title, total) as bar:
        for batch in batches:
            sums_NCHW = tta.accumulate(teacher.logits, batch.images_NCHW, config.tta, teacher.num_classes)
            masks_NHW, confidence_N, pixels_NC = finalize(sums_NCHW)
            if judged:
                matrix += confusion(masks_NHW, batch.labels_NHW, teacher.num_classes)
            confidence, pixels = confidence_N.tolist(), pixels_NC.tolist()  # sync: the results leave the device here
            for i, mask_HW, mean, counts in zip(batch.indices.tolist(), masks_NHW.cpu().numpy(), confidence, pixels,
                                                strict=True):
                name = mask_name(samples[i])
                writes.append(pool.submit(_write, out / name, mask_HW))
                found.append({"position": i, "key": samples[i].key, "mask": name, "width": samples[i].width,
                              "height": samples[i].height, "mean_confidence": mean, "class_pixels": counts})
            bar.advance(len(batch.indices))
        for write in writes:
            write.result()
    if hasattr(os, "sync"):
        os.sync()  # the masks were plain writes; what follows says that they are there
    everyone = sorted((row for part in distributed.gather(found) for row in part), key=lambda row: row.pop("position"))
    distributed.on_main(here, lambda: rows.write(out / "labels.parquet", everyone))
    miou = mean_iou(distributed.sum_over_ranks(matrix).cpu()) if judged else None
    return Labelled(images=len(everyone), miou=miou)


def mask_name(sample: Sample) -> str:
    """Path of a sample's pseudo label below the folder of its labelling."""
    return f"masks/{sample.key}.png"


def _write(path: Path, mask_HW) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_index_png(path, mask_HW)
