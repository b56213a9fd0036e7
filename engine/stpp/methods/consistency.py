"""Functions shared by UniMatch and UniMatch-V2: pseudo labels of the weak view, CutMix between neighbours,
and the streams of both lists.

Pixels below the confidence threshold, and padding, become 255 before labels are pasted: thresholding and
pasting commute, so no confidence map is passed on, and the label operators apply unchanged.

Legend: N images of a pass (even), C classes, H W crop size, h w size of low-resolution logits.
"""

from collections.abc import Sequence

import torch

from stpp.images.masks import IGNORE
from stpp.loading.sample import Batch, Sample, Stream
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised, repeat_few
from stpp.training.class_rules import NONE, ClassRules
from stpp.training.step import Step
from stpp_kernels import upsample_argmax


def train(run: Stages, name: str, step: type[Step]) -> None:
    """Runs the stage of a consistency method.

    With `--train.from-teacher` a stage on the labels alone comes first, whose weights it starts from: until
    predictions are confident, unlabelled images cost time and teach nothing. Not part of the published
    methods.
    """
    if not run.from_teacher:
        run.train(f"1-{name}", step, run.labelled, run.unlabelled)
        return
    first = run.train("1-supervised", Supervised, repeat_few(run.labelled), supervised=True)
    run.train(f"2-{name}", step, run.labelled, run.unlabelled, teacher=first.best)


def weak_and_strong(labelled: Sequence[Sample], unlabelled: Sequence[Sample], *,
                    strong: int) -> tuple[Stream, Stream]:
    """Makes the streams of a labelled list, weakly augmented, and of an unlabelled list in a weak view and
    `strong` strong views."""
    return (Stream(samples=labelled, views=("weak",)),
            Stream(samples=unlabelled, views=("weak", *["strong"] * strong), box="paste", masked=False,
                   number=1))


@torch.no_grad()
def pseudo_labels(logits_NChw: torch.Tensor, batch: Batch, confidence: float,
                  rules: ClassRules = NONE) -> torch.Tensor:
    """Computes the pseudo labels of the weak view: uint8 [N, H, W], 255 on padding and where the probability
    is below `confidence` or the threshold of the class."""
    size = batch.images_NCHW.shape[-2:]
    labels_NHW, probability_NHW = upsample_argmax(logits_NChw, size, confidence=True)
    confident_NHW = rules.is_confident(labels_NHW, probability_NHW, confidence)
    return labels_NHW.masked_fill(~(confident_NHW & inside(batch.shown_N4, size)), IGNORE)


def inside(boxes_N4: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Rasterises boxes (y, x, height, width) in images of `size`: bool [N, H, W], True inside."""
    (y, x, height, width), device = boxes_N4[:, :, None].unbind(1), boxes_N4.device
    rows_1H, columns_1W = (torch.arange(side, device=device)[None] for side in size)
    in_rows_NH = (rows_1H >= y) & (rows_1H < y + height)
    in_columns_NW = (columns_1W >= x) & (columns_1W < x + width)
    return in_rows_NH[:, :, None] & in_columns_NW[:, None, :]


def swapped(tensor: torch.Tensor) -> torch.Tensor:
    """Swaps neighbours along the first axis: 0 with 1, 2 with 3, ... The pairs do not depend on the number of
    ranks."""
    pairs = tensor.reshape(-1, 2, *tensor.shape[1:])
    mixed = pairs.flip(1).reshape(tensor.shape)
    return mixed.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else mixed


def pasted(tensor: torch.Tensor, boxes_N4: torch.Tensor) -> torch.Tensor:
    """Applies CutMix to images [N, 3, H, W], or labels or flags [N, H, W]: the neighbour's pixels inside each
    box."""
    in_box = inside(boxes_N4, tensor.shape[-2:])
    return torch.where(in_box[:, None] if tensor.dim() == 4 else in_box, swapped(tensor), tensor)


def mixed_views(batch: Batch) -> torch.Tensor:
    """Concatenates the strong views, each mixed with its own boxes: [V N, 3, H, W]."""
    return torch.cat([pasted(view, boxes) for view,
                      boxes in zip(batch.views[1:], batch.boxes_VN4[1:], strict=True)])


def mixed_losses(logits: Sequence[torch.Tensor], labels_NHW: torch.Tensor, batch: Batch,
                 rules: ClassRules = NONE) -> list[torch.Tensor]:
    """Sums the cross-entropy of each strong view with labels that are mixed like its images."""
    return [rules.cross_entropy(logits_NChw, pasted(labels_NHW, boxes))[0]
            for logits_NChw, boxes in zip(logits, batch.boxes_VN4[1:], strict=True)]


def shown_pixels(batch: Batch) -> list[torch.Tensor]:
    """Counts the pixels without padding, of the weak view and of each mixed strong view: int64 scalars."""
    shown_NHW = inside(batch.shown_N4, batch.images_NCHW.shape[-2:])
    return [shown_NHW.sum(), *(pasted(shown_NHW, boxes).sum() for boxes in batch.boxes_VN4[1:])]
