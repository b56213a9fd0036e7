"""Evaluation: exact mIoU at native size, on any number of ranks.

N images, C classes, H W size of the image.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from stpp import distributed, files, log
from stpp.config import DataConfig, WindowEdges
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images.pixels import NOT_FINITE
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.loading import loader
from stpp.loading.native import native_batches
from stpp.loading.sample import Batch, Sample
from stpp.metrics import iou_per_class, mean_iou
from stpp_kernels import confusion


@torch.inference_mode()
def evaluate(predictor: Predictor, samples: Sequence[Sample], world: World, data: DataConfig, *,
             mode: str = "none", crop_px: int | None = None, edges: WindowEdges = "cut",
             on_batch: Callable[[Batch, torch.Tensor], None] | None = None,
             refuse_nonfinite: bool = False) -> torch.Tensor:
    """Computes the confusion matrix of the predictions, each image counted once over all ranks.

    Args:
        samples: each with a mask.
        mode: test-time augmentation, key of `views.VIEWS`.
        crop_px: side of sliding windows, in pixels; None: whole images.
        edges: windows at the image edge, see `views.window_starts`.
        on_batch: called with every batch of this rank, and its masks, uint8 [N, H, W].
        refuse_nonfinite: reject non-finite logits instead of warning.

    Returns:
        int64 [C, C] on the CPU, rows truth, columns prediction, in pixels; the same on every rank.

    Raises:
        UserError: with `refuse_nonfinite`, the network's answer to an image is not finite.
    """
    matrix = torch.zeros(predictor.num_classes, predictor.num_classes, dtype=torch.int64, device=world.device)
    broken = torch.zeros((), dtype=torch.int64, device=world.device)
    share, threads = loader.native_share(samples, world), distributed.threads_per_rank(world, data.threads)
    for batch in native_batches(samples, share, device=world.device, loader=data.loader, threads=threads):
        masks_NHW, finite_N = views.finite_masks(predictor, batch.images_NCHW, mode, crop_px=crop_px,
                                                 edges=edges)
        broken += (~finite_N).sum()
        matrix += confusion(masks_NHW, batch.labels_NHW, predictor.num_classes)
        if on_batch is not None:
            on_batch(batch, masks_NHW)
    if count := int(distributed.sum_over_ranks(broken)):
        what = f"{NOT_FINITE} for {count} of {len(samples)} images"
        if refuse_nonfinite:
            raise UserError(f"{what}: there is no score")
        log.say(f"warning: {what}, which count as class 0")
    return distributed.sum_over_ranks(matrix).cpu()


def report(matrix: torch.Tensor, classes: Sequence[str], *, images: int, out: Path | None = None) -> str:
    """Formats a table of the scores, and writes them to `out` (JSON, percent) if given."""
    iou = dict(zip(classes, (100 * iou_per_class(matrix)).tolist(), strict=True))
    if out is not None:
        write_scores(out, images=images, miou=mean_iou(matrix), iou=iou)
    rows = [("class", "IoU")] + [(name, "-" if math.isnan(value) else f"{value:.2f}") for name,
                                 value in iou.items()]
    return log.table([*rows, ("mean", f"{mean_iou(matrix):.2f}")]) + f"\n{images} images"


def write_scores(out: Path, *, images: int, miou: float, iou: Mapping[str, float]) -> None:
    """Writes scores in percent as JSON; null for a class that occurs neither in truth nor in predictions."""
    files.write_json(out, {"images": images, "miou": miou,
                           "iou": {name: None if math.isnan(value) else value for name,
                                   value in iou.items()}})
