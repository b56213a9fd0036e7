"""The one EXIF rule, and opening image files safely.

The rule: with `exif=True` the pixels of an image are taken upright (its EXIF orientation is applied), and its
mask is expected upright too; a mask that carries an orientation of its own is turned by it. With `exif=False`
both are read as they are stored. What counts as an orientation stands in `stpp.images.reading`.

H and W: pixels. This module imports neither torch nor pyarrow, so that worker processes start quickly.
"""

import contextlib
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from stpp.errors import UserError

if TYPE_CHECKING:
    import torch

Pixels = TypeVar("Pixels", np.ndarray, "torch.Tensor")
"""An array or a tensor of pixels."""

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
"""What is opened at all: Pillow knows formats that start other programs."""

MAX_PIXELS = 1 << 27
"""Largest image that is decoded (134 megapixels): a tiny file can declare a size that fills the memory."""

DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on files that are broken or made to break it."""

ORIENTATION_TAG = 0x0112

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# `opened` refuses where Pillow only warns, up to twice its limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of damaged EXIF blocks and transparent palettes, which are read by the rules of `stpp.images.reading`.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@contextlib.contextmanager
def opened(path: str | os.PathLike, formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """Opens an image lazily; any failure to decode it inside the block becomes a UserError that names the
    file.

    Args:
        path: the file.
        formats: Pillow's names of the formats that may be opened.
    """
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {width}x{height} pixels are more than the {MAX_PIXELS} that are read; make it "
                    "smaller"
                )
            yield image
    except UserError:
        raise
    except DECODE_ERRORS as error:
        raise UserError(
            f"{path}: cannot be read as an image ({reason(path, error, formats)}); replace or remove it"
        ) from error


def reason(path: str | os.PathLike, error: Exception, formats: tuple[str, ...]) -> str:
    """One line that says why Pillow could not read `path`."""
    if isinstance(error, Image.UnidentifiedImageError):
        try:
            size = os.path.getsize(path)
        except OSError:
            size = -1
        return "the file is empty" if size == 0 else f"none of the formats {', '.join(formats)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 (upright) where it has none or a senseless one.

    Of a TIFF Pillow reads no more once it is loaded: it has then been turned. Of a PNG whose eXIf chunk
    follows the pixels Pillow reads it only once they are loaded.
    """
    if image.format == "TIFF":
        return _sensible(image.tag_v2.get(ORIENTATION_TAG))
    block = image.info.get("exif")
    return exif_orientation(block) if block else 1


def exif_orientation(block: bytes) -> int:
    """The orientation in an EXIF block, 1 to 8; 1 where it has none, or is damaged: cameras and editors write
    many that are."""
    tags = Image.Exif()
    try:
        tags.load(block)
        return _sensible(tags.get(ORIENTATION_TAG))
    except DECODE_ERRORS:
        return 1


def _sensible(value: object) -> int:
    """One number from 1 to 8, of whatever numeric type, as Pillow takes it where it turns by itself; 1 for
    all else."""
    return next((turn for turn in range(1, 9) if value == turn), 1)


def upright_size(width: int, height: int, value: int) -> tuple[int, int]:
    """(width, height) after an image of this stored size is turned upright from orientation `value`."""
    return (height, width) if value >= 5 else (width, height)


def upright(pixels: Pixels, value: int) -> Pixels:
    """Turns pixels [H, W] or [H, W, C] upright from EXIF orientation `value`: a view of an array, without a
    copy; or a tensor."""
    if value >= 5:
        pixels = pixels.swapaxes(0, 1)
    # After the transposition of 5..8: 6 is turned clockwise, so columns are reversed; 8 reverses rows; 7
    # both.
    flipped = [axis for axis, turned in ((1, (2, 3, 6, 7)), (0, (3, 4, 7, 8))) if value in turned]
    if not flipped:
        return pixels
    return np.flip(pixels, flipped) if isinstance(pixels, np.ndarray) else pixels.flip(flipped)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm",
                    ".pgm")
"""Endings of images in folders and archives, in any case of letters; the same in every command."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of red, green and blue in 0..1; both loaders normalise with them."""
