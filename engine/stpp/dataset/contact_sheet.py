"""The contact sheet: a few images of a data set overlaid with their masks, for visual inspection."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from stpp import files
from stpp.errors import UserError
from stpp.images.palette import overlay, palette
from stpp.loading.decode import image_of, mask_of
from stpp.loading.sample import Sample

IMAGES, COLUMNS = 8, 4
CELL_PX, TITLE_PX, GAP_PX, SWATCH_PX = 240, 16, 6, 14
MOST_NAMES = 40


def spread(images: Sequence[str]) -> Sequence[str]:
    """Selects up to eight images, evenly spaced over the list."""
    return images[:: math.ceil(len(images) / IMAGES) or 1][:IMAGES]


def write(path: Path, samples: Iterable[Sample], classes: Sequence[str]) -> None:
    """Writes a PNG of samples with a class legend; nothing if no sample can be read."""
    cells = [cell for sample in samples if (cell := _cell(sample, len(classes))) is not None]
    if not cells:
        return
    columns = min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    pitch = CELL_PX + GAP_PX
    names = [*classes[:MOST_NAMES], *(["..."] if len(classes) > MOST_NAMES else [])]
    legend_rows = math.ceil(len(names) / columns)
    sheet = Image.new(
        "RGB",
        (
            columns * pitch + GAP_PX,
            rows * (pitch + TITLE_PX) + GAP_PX + legend_rows * (SWATCH_PX + 4) + GAP_PX,
        ),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, (title, picture) in enumerate(cells):
        left, top = GAP_PX + i % columns * pitch, GAP_PX + i // columns * (pitch + TITLE_PX)
        draw.text((left, top), title, fill="black", font=font)
        sheet.paste(picture, (left, top + TITLE_PX))
    colours, top = palette(len(classes)), rows * (pitch + TITLE_PX) + GAP_PX
    for i, name in enumerate(names):
        left, y = GAP_PX + i % columns * pitch, top + i // columns * (SWATCH_PX + 4)
        if name != "..." or i < len(classes):
            draw.rectangle(
                [left, y, left + SWATCH_PX, y + SWATCH_PX], fill=tuple(colours[i].tolist()), outline="gray"
            )
        draw.text((left + SWATCH_PX + 4, y), _plain(name, 30), fill="black", font=font)
    with files.atomic(path) as file:
        sheet.save(file, format="PNG", compress_level=1)


def _cell(sample: Sample, num_classes: int) -> tuple[str, Image.Image] | None:
    """Name and picture of a sample; None if it cannot be read."""
    try:
        image = Image.fromarray(np.ascontiguousarray(image_of(sample)))
        mask = Image.fromarray(mask_of(sample)) if sample.mask else None
    except UserError:
        return None
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST)
    if mask is not None:
        colours = Image.fromarray(
            overlay(np.asarray(mask.resize(size, Image.Resampling.NEAREST)), num_classes)
        )
        colours.putalpha(colours.getchannel("A").point(lambda alpha: alpha // 2))
        picture.paste(colours, (0, 0), colours)
    return _plain(sample.key, 38), picture


def _plain(text: str, limit: int) -> str:
    """The end of a text, restricted to the characters of the built-in font."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    return text if len(text) <= limit else f"...{text[3 - limit :]}"
