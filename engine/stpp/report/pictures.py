"""Thumbnails of labelled images: the image, its classes, its ignored pixels, its confidence."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from stpp.errors import UserError
from stpp.images import pixels
from stpp.images.image_file import DECODE_ERRORS, upright
from stpp.images.palette import confidence_colours, ignored_overlay, overlay
from stpp.label import confidence_map, mask_files, rows
from stpp.report.labelling import Image, Labelling

SIDE_PX = 256
"""Maximum longer side of a picture."""
SWATCH_HW = (16, 28)


def draw(labelling: Labelling, images: Sequence[Image], folder: Path, *, first: int,
         num_classes: int) -> dict[str, int]:
    """Writes `<number>.jpg` and `<number>-classes.png`; `<number>-ignored.png` if pixels are ignored; and
    `<number>-confidence.jpg`, unless the labels are of an older version.

    Args:
        first: number of the first picture. File names are numbers, because image names are untrusted.

    Returns:
        Picture number by image key, without images that are missing or have no mask.
    """
    number_of: dict[str, int] = {}
    by_part: dict[str, list[Image]] = {}
    for image in images:
        by_part.setdefault(image.part, []).append(image)
    for part, members in by_part.items():
        planned = _by_key(labelling.folder / "plan" / f"{part}.parquet")
        labelled = _by_key(labelling.folder / "labels" / f"{part}.parquet", ("key", "confidence_map"))
        try:
            masks = mask_files.MaskFiles(labelling.folder, part)
        except UserError:  # a damaged archive: no pictures of its images
            continue
        for image in members:
            try:
                row = planned[image.key]
                seen_HWC = upright(pixels.decode(rows.item(row).read()), row["orientation"] or 1)
                mask_HW = mask_files.read(masks.place(image.key))
            except (KeyError, UserError, pixels.BadImage, *DECODE_ERRORS):
                continue
            number = first + len(number_of)
            size = _write(folder, number, seen_HWC, mask_HW, num_classes)
            confidence_HW = confidence_map.read(labelled.get(image.key, {}).get("confidence_map") or b"",
                                       *mask_HW.shape)
            if confidence_HW is not None:
                large = Pillow.fromarray(confidence_colours(confidence_HW))
                large.resize(size, Pillow.Resampling.BILINEAR).save(folder / f"{number}-confidence.jpg",
                                                                    quality=82)
            number_of[image.key] = number
    return number_of


def swatch(class_id: int, num_classes: int) -> str:
    """Sample of a class's colour and pattern, or of ignored pixels (255), as a data URL."""
    mask_HW = np.full(SWATCH_HW, class_id, dtype=np.uint8)
    return _data_url(ignored_overlay(mask_HW) if class_id == 255 else overlay(mask_HW, num_classes))


def confidence_scale() -> str:
    """Confidence scale from 0 to 1, left to right, as a data URL."""
    return _data_url(confidence_colours(np.tile(np.arange(256, dtype=np.uint8), (SWATCH_HW[0], 1))))


def _data_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _by_key(path: Path, columns: Sequence[str] | None = None) -> dict[str, dict]:
    """Rows of a table part by key; empty if it is missing."""
    try:
        return {row["key"]: row for row in rows.read(path, columns)}
    except UserError:
        return {}


def _write(folder: Path, number: int, seen_HWC: np.ndarray, mask_HW: np.ndarray,
           num_classes: int) -> tuple[int, int]:
    """Writes the pictures of an image; returns their width and height."""
    height, width = mask_HW.shape
    scale = min(1.0, SIDE_PX / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    Pillow.fromarray(np.ascontiguousarray(seen_HWC)).resize(size, Pillow.Resampling.BOX).save(
        folder / f"{number}.jpg", quality=82
    )
    small_HW = np.asarray(Pillow.fromarray(mask_HW).resize(size, Pillow.Resampling.NEAREST))
    Pillow.fromarray(overlay(small_HW, num_classes)).save(folder / f"{number}-classes.png")
    if (small_HW == 255).any():
        Pillow.fromarray(ignored_overlay(small_HW)).save(folder / f"{number}-ignored.png")
    return size
