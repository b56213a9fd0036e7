"""ST++'s selection: which unlabelled images three checkpoints agree on.

N images, H W size of the image.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from stpp import distributed, files, log
from stpp.config import DataConfig
from stpp.data import loader
from stpp.data.sample import Sample
from stpp.distributed import World
from stpp.label import rows
from stpp.teacher.engine import Teacher
from stpp_kernels import pairwise_iou, upsample_argmax


@torch.inference_mode()
def reliability(teachers: Sequence[Teacher], samples: Sequence[Sample], here: World, data: DataConfig) -> list[float]:
    """Mean IoU between the last teacher's prediction and each earlier one's, for every sample, the same on every rank.

    Args:
        teachers: checkpoints of one run in the order of training; the last one judges.

    Source: ST++ (arXiv 2106.05095), section 3.3.
    """
    *earlier, last = teachers
    total, batches = loader.native_batches(samples, here, data)
    scores: dict[int, float] = {}
    with log.Progress("select", total) as bar:
        for batch in batches:
            size = batch.images_NCHW.shape[-2:]
            reference_NHW = upsample_argmax(last.logits(batch.images_NCHW), size)
            total_N = torch.zeros(len(batch.indices), dtype=torch.float64, device=here.device)
            for teacher in earlier:
                masks_NHW = upsample_argmax(teacher.logits(batch.images_NCHW), size)
                total_N += pairwise_iou(masks_NHW, reference_NHW, last.num_classes)
            scores |= zip(batch.indices.tolist(), (total_N / len(earlier)).tolist(), strict=True)
            bar.advance(len(batch.indices))
    everyone = {i: score for part in distributed.gather(scores) for i, score in part.items()}
    return [everyone[i] for i in range(len(samples))]


def split_by_reliability(scores: Sequence[float]) -> tuple[list[int], list[int]]:
    """Positions of the reliable half (floor of half, most reliable first) and of the rest; ties keep their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    half = len(scores) // 2
    return order[:half], order[half:]


def write_selection(out: Path, samples: Sequence[Sample], lines: Sequence[str], scores: Sequence[float]) -> None:
    """Writes `reliability.parquet`, `reliable_ids.txt` and `unreliable_ids.txt` (`lines` of the unlabelled list)."""
    reliable, unreliable = split_by_reliability(scores)
    trusted = set(reliable)
    rows.write(out / "reliability.parquet", [
        {"key": sample.key, "reliability": score, "reliable": i in trusted}
        for i, (sample, score) in enumerate(zip(samples, scores, strict=True))])
    for name, positions in (("reliable_ids.txt", reliable), ("unreliable_ids.txt", unreliable)):
        files.write_text(out / name, "".join(lines[i] for i in positions))
