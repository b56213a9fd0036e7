"""A sheet of examples: image, truth, and what each stage's network makes of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stpp import files
from stpp.data import loader
from stpp.data.masks import read_index_mask
from stpp.data.sample import Sample
from stpp.report.palette import colourise
from stpp.teacher.engine import Teacher
from stpp_kernels import upsample_argmax

CELL_PX = 160
TITLE_PX = 18
GAP_PX = 4


@torch.inference_mode()
def write_examples(path: Path, samples: Sequence[Sample], teachers: dict[str, Teacher], device: torch.device, *,
                   exif: bool) -> None:
    """Writes a PNG: one row a sample; columns image, truth, and one for each teacher by its title.

    Args:
        samples: each has a mask; a handful.
    """
    columns: dict[str, list[np.ndarray]] = {"image": [], "truth": []} | {title: [] for title in teachers}
    batches = [[i] for i in range(len(samples))]
    for batch in loader.pick("reference").eval_batches(samples, batches, device=device, threads=1, exif=exif):
        sample = samples[batch.indices[0]]
        num_classes = next(iter(teachers.values())).num_classes
        columns["image"].append(_shown(batch.images_NCHW[0]))
        columns["truth"].append(colourise(read_index_mask(sample.mask, exif=exif), num_classes))
        for title, teacher in teachers.items():
            mask_NHW = upsample_argmax(teacher.logits(batch.images_NCHW), batch.images_NCHW.shape[-2:])
            columns[title].append(colourise(mask_NHW[0].cpu().numpy(), num_classes))
    sheet = _sheet(columns)
    with files.atomic(path) as file:
        sheet.save(file, format="PNG", optimize=True)


def _shown(image_CHW: torch.Tensor) -> np.ndarray:
    """A normalised image as uint8 [H, W, 3]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
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
