"""Example pictures: image, truth and predictions, as a sheet at the end of a run and as pictures during
it."""

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stpp import files
from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.images.palette import colourise
from stpp.inference import views
from stpp.inference.open import Predictor
from stpp.loading.native import native_batches
from stpp.loading.sample import Batch, Sample

CELL_PX = 160
TITLE_PX = 18
GAP_PX = 4
PICTURE_PX = 192
"""Maximum longer side of each third of a picture."""


@torch.inference_mode()
def write_examples(path: Path, samples: Sequence[Sample], teachers: dict[str, Predictor],
                   device: torch.device) -> None:
    """Writes a PNG with one row per sample: image, truth, and a prediction of each teacher under its title.

    Args:
        samples: a few samples, each with a mask.
    """
    columns: dict[str, list[np.ndarray]] = {"image": [], "truth": []} | {title: [] for title in teachers}
    batches = [[i] for i in range(len(samples))]
    for batch in native_batches(samples, batches, device=device, loader="reference"):
        num_classes = next(iter(teachers.values())).num_classes
        columns["image"].append(_denormalised(batch.images_NCHW[0]))
        columns["truth"].append(colourise(batch.labels_NHW[0].cpu().numpy(), num_classes))
        for title, teacher in teachers.items():
            mask_NHW = views.masks(teacher, batch.images_NCHW, "none")
            columns[title].append(colourise(mask_NHW[0].cpu().numpy(), num_classes))
    sheet = _sheet(columns)
    with files.atomic(path) as file:
        sheet.save(file, format="PNG", optimize=True)


class PictureRecorder:
    """Records pictures of selected samples during an evaluation."""

    def __init__(self, samples: Sequence[Sample], selected: Collection[int], num_classes: int):
        self._samples, self._selected, self._num_classes = samples, frozenset(selected), num_classes
        self.pictures: dict[str, np.ndarray] = {}
        """Pictures by sample key: image, truth and prediction side by side, uint8 [H, W, 3]."""

    def record(self, batch: Batch, masks_NHW: torch.Tensor) -> None:
        """Records pictures with truth for the batch's selected samples."""
        for row, position in enumerate(batch.indices.tolist()):
            if position in self._selected:
                masks = (colourise(mask_HW.cpu().numpy(), self._num_classes)
                         for mask_HW in (batch.labels_NHW[row], masks_NHW[row]))
                self.pictures[self._samples[position].key] = _side_by_side(
                    _denormalised(batch.images_NCHW[row]), *masks
                )


def _side_by_side(image_HWC: np.ndarray, *masks_HWC: np.ndarray) -> np.ndarray:
    """Resizes to `PICTURE_PX` and joins in one row."""
    height, width = image_HWC.shape[:2]
    scale = min(1.0, PICTURE_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    row = Image.new("RGB", ((size[0] + GAP_PX) * (1 + len(masks_HWC)) - GAP_PX, size[1]), "white")
    for i, cell in enumerate((image_HWC, *masks_HWC)):
        resample = Image.Resampling.NEAREST if i else Image.Resampling.BOX
        row.paste(Image.fromarray(cell).resize(size, resample), (i * (size[0] + GAP_PX), 0))
    return np.asarray(row)


def _denormalised(image_CHW: torch.Tensor) -> np.ndarray:
    """Normalised image as uint8 [H, W, 3]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    image_HWC = image_CHW.float().cpu().permute(1, 2, 0) * std + mean
    return (image_HWC * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _sheet(columns: dict[str, list[np.ndarray]]) -> Image.Image:
    rows = len(columns["image"])
    pitch = CELL_PX + GAP_PX
    sheet = Image.new("RGB", (len(columns) * pitch + GAP_PX, rows * pitch + TITLE_PX + GAP_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (title, cells) in enumerate(columns.items()):
        left = GAP_PX + i * pitch
        draw.text((left, GAP_PX), title, fill="black", font=font)
        for j, cell in enumerate(cells):
            height, width = cell.shape[:2]
            scale = CELL_PX / max(height, width)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            resample = Image.Resampling.BICUBIC if i == 0 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(cell).resize(size, resample), (left, TITLE_PX + GAP_PX + j * pitch))
    return sheet
