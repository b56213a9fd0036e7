"""Confidence thresholds that keep a share of each class's pixels: class-balanced self-training.

They are quantiles over a sample of images spread over the corpus, computed before the first shard is
labelled and stored with the plan: every rank and every later call uses the same thresholds.

Source: "Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training"
(arXiv 1810.07911), algorithm 2. Legend: C classes, B bins of the confidence p.

Bins have equal widths in -log2(1 - p): most pixels of a frequent class have a p above 0.999.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from stpp import files
from stpp.clock import Clock
from stpp.distributed import World, threads_per_rank
from stpp.errors import UserError
from stpp.images import batches, planning
from stpp.images.planning import Planned
from stpp.inference import calibration, views
from stpp.inference.open import Predictor
from stpp.label.assignment import Assignment
from stpp.label.plan import Plan

NAME = "class-confidence.json"
BINS_PER_OCTAVE, OCTAVES = 200, 20
"""Bins for each halving of 1 - p, and the number of halvings: pixels above 1 - 2^-20 are not told apart."""
BINS = BINS_PER_OCTAVE * OCTAVES
MOST_IMAGES = 256
"""Maximum images in the sample, rounded up to whole batches."""
MOST_SHARDS = 16
"""Maximum shards that they are taken from; all of their headers are read."""


def ensure(network: Predictor, mode: str, task: Assignment, plan: Plan, world: World) -> None:
    """Computes and writes the thresholds of a labelling, unless they exist.

    Raises:
        UserError: no image can be read.
    """
    path = _path(task.out)
    if not path.exists():
        counts_CB = _counts(network, mode, task, plan, world)
        files.write_json(path, {"keep_share": task.config.keep_share,
                                "confidence": quantiles(counts_CB, task.config.keep_share)})


def read(out: Path) -> tuple[float, ...]:
    """Reads the confidence threshold of each class.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return tuple(map(float, json.loads(_path(out).read_text(encoding="utf-8"))["confidence"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{_path(out)}: cannot be read ({error}); choose another --out") from None


def quantiles(counts_CB: np.ndarray, share: float) -> list[float]:
    """Largest threshold of each class that keeps at least a share of its pixels; 0 for a class without
    pixels."""
    thresholds = []
    for counts_B in counts_CB:
        kept_B = counts_B[::-1].cumsum()[::-1]
        enough = np.flatnonzero(kept_B >= share * counts_B.sum())
        thresholds.append(float(1 - 2.0 ** -(enough[-1] / BINS_PER_OCTAVE)) if counts_B.any() else 0.0)
    return thresholds


def bins(confidence: torch.Tensor) -> torch.Tensor:
    """Computes the bin of each confidence: int64."""
    octaves = -(1 - confidence.nan_to_num(0, 0, 0).double()).clamp(min=2.0**-OCTAVES).log2()
    return (octaves * BINS_PER_OCTAVE).long().clamp(0, BINS - 1)


def _path(out: Path) -> Path:
    return out / "plan" / NAME


@torch.inference_mode()
def _counts(network: Predictor, mode: str, task: Assignment, plan: Plan, world: World) -> np.ndarray:
    """Counts pixels by class and confidence, int64 [C, B], of the sample."""
    threads = threads_per_rank(world, task.data.threads)
    size = network.num_classes
    total_CB = torch.zeros(size, BINS, dtype=torch.int64, device=world.device)
    with ThreadPoolExecutor(threads, "stpp-plan") as pool:
        chosen = _spread(plan, pool)
    for _, batch in batches.batches(((0, planned) for planned in chosen), device=world.device,
                                    kind=task.decoder, threads=threads, most=plan.cut.max_batch,
                                    clock=Clock()):
        good = [i for i in range(len(batch.planned)) if i not in batch.errors]
        if good:
            sums_NCHW = views.accumulate(network, batch.images_NCHW, mode)[good]
            shape = tuple(batch.images_NCHW.shape[-2:])
            masks_NHW, *_ = views.masks_of_sums(sums_NCHW, shape)
            bins_NHW = bins(views.confidence_of_sums(sums_NCHW, shape))
            everywhere = torch.ones_like(masks_NHW, dtype=torch.bool)
            total_CB += calibration.count_pixels(masks_NHW.long(), bins_NHW, everywhere, size, BINS)
    if not total_CB.any():
        raise UserError(f"{task.out}: none of the images sampled for --keep-share can be read")
    return total_CB.cpu().numpy()


def _spread(plan: Plan, pool: ThreadPoolExecutor) -> list[list[Planned]]:
    """Chooses batches spread over evenly spaced shards: a shard may be one folder, or images of one size."""
    n_shards = min(plan.shards, MOST_SHARDS)
    wanted, chosen = -(-MOST_IMAGES // n_shards), []
    for i in range(n_shards):
        of_shard = list(planning.batches(plan.planned(i * plan.shards // n_shards, pool)))
        stride = max(1, sum(map(len, of_shard)) // wanted)
        chosen += of_shard[::stride]
    return chosen
