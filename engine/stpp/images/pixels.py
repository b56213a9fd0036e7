"""Decoding of one in-memory image file to RGB with PIL, and normalisation. The alternative decoder is DALI
(stpp.images.decode_dali).

This module alone decides which images are bad, with either decoder. Colour rules: `stpp.images.reading`. H W:
pixels. This module imports no torch.
"""

import io

import numpy as np
from PIL import Image, ImageChops

from stpp.images.image_file import (
    DECODE_ERRORS,
    IMAGE_FORMATS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    Pixels,
    orientation,
    upright,
)

MEAN = np.array(IMAGENET_MEAN, dtype=np.float32) * 255
SCALE = 1 / (np.array(IMAGENET_STD, dtype=np.float32) * 255)
"""Pixels are normalised as (pixel - MEAN) * SCALE; float32 [3] each."""
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_OPPOSITE = {6: 8, 8: 6}
"""Orientations with a different inverse; every other one is its own inverse."""


NOT_FINITE = "the network's answer is not finite"


class BadImage(Exception):
    """An image that cannot be labelled; the message is a short reason without the name."""


def decode(data: bytes) -> np.ndarray:
    """Decodes a whole file to stored RGB, not rotated: uint8 [H, W, 3].

    Raises:
        BadImage: not an image, damaged, truncated, too large, or of a kind without colours.
    """
    try:
        with opened_bytes(data) as image:
            return colours(image)
    except DECODE_ERRORS as error:
        raise BadImage(describe_error(error)) from None


def colours(image: Image.Image) -> np.ndarray:
    """RGB of an image that Pillow has opened, not rotated: uint8 [H, W, 3].

    Raises:
        BadImage: an image of a kind without colours.
        Exception: one of `DECODE_ERRORS`, if it cannot be decoded.
    """
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    turned = 1
    if image.format == "TIFF":
        # Pillow rotates a TIFF by its tag on load and drops the tag. It memory-maps uncompressed files with
        # the rotated size, which scrambles them; without a file name it reads instead.
        turned, image.filename = orientation(image), ""
    image.load()
    pixels = _rgb(image)
    return upright(pixels, _OPPOSITE.get(turned, turned))


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a loaded image."""
    if image.mode in _DEEP:
        return _from_deep(np.asarray(image), range_bits(stored_bits(image)))
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow assumes inverted inks for every JPEG; without Adobe's marker they are not inverted.
        image = ImageChops.invert(image)
    return np.asarray(image.convert("RGB"))


def opened_bytes(data: bytes) -> Image.Image:
    """Opens the image in the bytes of a file without decoding it.

    Raises:
        BadImage: empty file, or an image with no or too many pixels.
        Exception: one of `DECODE_ERRORS`, if it cannot be opened.
    """
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels exceed the {MAX_PIXELS} allowed")
    if image.width < 1 or image.height < 1:
        raise BadImage(f"it has no pixels ({image.width}x{image.height})")
    return image


def stored_bits(image: Image.Image) -> int:
    """Bits per channel of an opened image, as far as Pillow exposes them; PNGs need their header."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 1)
        bits = bits[0] if isinstance(bits, tuple) and bits else bits
        return bits if isinstance(bits, int) and 1 <= bits <= 64 else 8
    if image.mode == "1":
        return 1
    return 16 if image.mode in _DEEP else 8


def range_bits(bits: int) -> int:
    """Bits of the value of white for so many bits per channel: 12 of 12, at most 16."""
    return min(bits, 16) if bits > 8 else 16


def _from_deep(values_HW: np.ndarray, bits: int) -> np.ndarray:
    """Converts gray of up to 16 bits to uint8 [H, W, 3], keeping the upper 8 bits."""
    if values_HW.size and values_HW.min() < 0:
        raise BadImage("its pixels are negative numbers; convert it to 8 or 16 bits without a sign")
    if values_HW.size and values_HW.max() >> bits:
        raise BadImage("its pixels have more than 16 bits; convert it to 8 or 16 bits")
    return np.repeat((values_HW >> bits - 8).astype(np.uint8)[..., None], 3, axis=2)


def describe_error(error: Exception) -> str:
    """Short reason of Pillow's failure on a file."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not one of the formats {', '.join(IMAGE_FORMATS)}, or damaged at its beginning"
    if isinstance(error, Image.DecompressionBombError):
        return f"it declares more than the {MAX_PIXELS} pixels allowed"
    return "cannot be decoded (" + (" ".join(str(error).split())[:160] or type(error).__name__) + ")"


def attempt(raw: bytes | BadImage) -> np.ndarray | BadImage:
    """Pixels from `decode`, or the BadImage as a value."""
    try:
        return raw if isinstance(raw, BadImage) else decode(raw)
    except BadImage as bad:
        return bad


def normalised(pixels: Pixels) -> Pixels:
    """Normalises uint8 [..., 3], an array or a tensor on any device, to float32 with ImageNet mean and
    standard deviation.

    Arrays and CPU tensors give identical bits.
    """
    if isinstance(pixels, np.ndarray):
        return (pixels.astype(np.float32) - MEAN) * SCALE
    from stpp.device import constant  # a tensor implies that torch is loaded

    mean, scale = (constant(tuple(values.tolist()), pixels.device) for values in (MEAN, SCALE))
    return pixels.float().sub_(mean).mul_(scale)
