"""The EXIF rule, and safe opening of image files.

The rule: with `exif=True`, images are rotated upright by their EXIF orientation, and masks are expected
upright; a mask with its own orientation is rotated by it. With `exif=False`, both are read as stored. Valid
orientations are defined in `stpp.images.reading`.

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
"""An array or tensor of pixels."""

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
"""Formats that are opened; Pillow also supports formats that start other programs."""

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
"""Exceptions that Pillow raises on broken or malicious files."""

ORIENTATION_TAG = 0x0112

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# `opened` rejects images between Pillow's limit and twice the limit, for which Pillow only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Damaged EXIF blocks and transparent palettes are handled by the rules of `stpp.images.reading`.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@contextlib.contextmanager
def opened(path: str | os.PathLike, formats: tuple[str, ...] = IMAGE_FORMATS) -> Iterator[Image.Image]:
    """Opens an image lazily; decoding errors inside the block become a UserError that names the file.

    Args:
        path: the file.
        formats: Pillow's names of the accepted formats.
    """
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{path}: {width}x{height} pixels exceed the {MAX_PIXELS} allowed; resize it")
            yield image
    except UserError:
        raise
    except DECODE_ERRORS as error:
        raise UserError(
            f"{path}: cannot be read as an image ({reason(path, error, formats)}); replace or remove it"
        ) from error


def reason(path: str | os.PathLike, error: Exception, formats: tuple[str, ...]) -> str:
    """One-line reason of Pillow's failure to read `path`."""
    if isinstance(error, Image.UnidentifiedImageError):
        try:
            size = os.path.getsize(path)
        except OSError:
            size = -1
        return "the file is empty" if size == 0 else f"not one of the formats {', '.join(formats)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 (upright) if missing or invalid.

    For TIFF, Pillow rotates on load and then drops the tag. For a PNG whose eXIf chunk follows the pixels,
    the tag is available only after loading.
    """
    if image.format == "TIFF":
        return _sensible(image.tag_v2.get(ORIENTATION_TAG))
    block = image.info.get("exif")
    return exif_orientation(block) if block else 1


def exif_orientation(block: bytes) -> int:
    """Orientation in an EXIF block, 1 to 8; 1 if missing or if the block is damaged, as many cameras and
    editors write them."""
    tags = Image.Exif()
    try:
        tags.load(block)
        return _sensible(tags.get(ORIENTATION_TAG))
    except DECODE_ERRORS:
        return 1


def _sensible(value: object) -> int:
    """An orientation from 1 to 8 of any numeric type, as in Pillow's own rotation; 1 for any other value."""
    return next((turn for turn in range(1, 9) if value == turn), 1)


def upright_size(width: int, height: int, value: int) -> tuple[int, int]:
    """(width, height) of an image of this stored size after rotation from orientation `value`."""
    return (height, width) if value >= 5 else (width, height)


def upright(pixels: Pixels, value: int) -> Pixels:
    """Rotates pixels [H, W] or [H, W, C] upright from EXIF orientation `value`; arrays are returned as a
    view."""
    if value >= 5:
        pixels = pixels.swapaxes(0, 1)
    # After the transposition of 5..8: 6 is rotated clockwise, so columns are reversed; 8 reverses rows; 7
    # both.
    flipped = [axis for axis, turned in ((1, (2, 3, 6, 7)), (0, (3, 4, 7, 8))) if value in turned]
    if not flipped:
        return pixels
    return np.flip(pixels, flipped) if isinstance(pixels, np.ndarray) else pixels.flip(flipped)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm",
                    ".pgm")
"""Image extensions in folders and archives, case-insensitive; the same in every command."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)
"""For red, green and blue in 0..1; both loaders normalise with `IMAGENET_MEAN` and this."""
