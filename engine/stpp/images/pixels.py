"""Pixels of one image file in memory as PIL reads them, and their normalisation: the one PIL decoder
to RGB. Beside it stands DALI's (stpp.images.decode_dali).

What is bad is decided here alone, whichever decoder a run uses. The rules of colours stand in
`stpp.images.reading`. H W: pixels. This module imports no torch.
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
"""A pixel is normalised as (pixel - MEAN) * SCALE; float32 [3] each."""
_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_OPPOSITE = {6: 8, 8: 6}
"""Orientations whose turn another one undoes; every other undoes itself."""


class BadImage(Exception):
    """An image that cannot be labelled; the message is the reason, in a few words without the name."""


def decode(data: bytes) -> np.ndarray:
    """Colours of a whole file as they are stored, not turned: uint8 [H, W, 3].

    Raises:
        BadImage: no image, damaged, cut short, too large, or of a kind that has no colours.
    """
    try:
        with opened_bytes(data) as image:
            return colours(image)
    except DECODE_ERRORS as error:
        raise BadImage(why(error)) from None


def colours(image: Image.Image) -> np.ndarray:
    """See `decode`; of an image that Pillow has opened.

    Raises:
        BadImage: of a kind that has no colours.
        Exception: one of `DECODE_ERRORS`, where it cannot be decoded.
    """
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    turned = 1
    if image.format == "TIFF":
        # Pillow turns a TIFF by its tag while it loads it, and removes the tag. An uncompressed file it maps
        # into memory by the size after the turn, which scrambles it; without a name it reads the file.
        turned, image.filename = orientation(image), ""
    image.load()
    pixels = _rgb(image)
    return upright(pixels, _OPPOSITE.get(turned, turned))


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a loaded image."""
    if image.mode in _DEEP:
        return _from_deep(np.asarray(image), range_bits(stored_bits(image)))
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Pillow takes the inks of every JPEG for inverted; without Adobe's marker they are not.
        image = ImageChops.invert(image)
    return np.asarray(image.convert("RGB"))


def opened_bytes(data: bytes) -> Image.Image:
    """The image in the bytes of a file, opened, not decoded.

    Raises:
        BadImage: it is empty, or has no or too many pixels.
        Exception: one of `DECODE_ERRORS`, where it cannot be opened.
    """
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} that are ever "
                       "decoded")
    if image.width < 1 or image.height < 1:
        raise BadImage(f"it has no pixels ({image.width}x{image.height})")
    return image


def stored_bits(image: Image.Image) -> int:
    """Bits a channel of an opened image, as far as Pillow tells: a PNG's stand in its header alone."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 1)
        bits = bits[0] if isinstance(bits, tuple) and bits else bits
        return bits if isinstance(bits, int) and 1 <= bits <= 64 else 8
    if image.mode == "1":
        return 1
    return 16 if image.mode in _DEEP else 8


def range_bits(bits: int) -> int:
    """Bits that white has in an image of so many bits a channel: 12 in one of 12, 16 in any of more."""
    return min(bits, 16) if bits > 8 else 16


def _from_deep(values_HW: np.ndarray, bits: int) -> np.ndarray:
    """Gray of up to 16 bits to uint8 [H, W, 3]: the upper 8 of its bits."""
    if values_HW.size and values_HW.min() < 0:
        raise BadImage("its pixels are negative numbers; convert it to 8 or 16 bits without a sign")
    if values_HW.size and values_HW.max() >> bits:
        raise BadImage("its pixels have more than 16 bits; convert it to 8 or 16 bits")
    return np.repeat((values_HW >> bits - 8).astype(np.uint8)[..., None], 3, axis=2)


def why(error: Exception) -> str:
    """The reason why Pillow failed on a file, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"none of the formats {', '.join(IMAGE_FORMATS)}, or damaged at its beginning"
    if isinstance(error, Image.DecompressionBombError):
        return f"it declares more than the {MAX_PIXELS} pixels that are ever decoded"
    return "cannot be decoded (" + (" ".join(str(error).split())[:160] or type(error).__name__) + ")"


def attempt(raw: bytes | BadImage) -> np.ndarray | BadImage:
    """`pixels.decode`, with the failure as a value."""
    try:
        return raw if isinstance(raw, BadImage) else decode(raw)
    except BadImage as bad:
        return bad


def normalised(pixels: Pixels) -> Pixels:
    """uint8 [..., 3], an array or a tensor on any device, to float32 of the same kind with ImageNet mean and
    standard deviation.

    Arrays and tensors on a CPU get the same bits.
    """
    if isinstance(pixels, np.ndarray):
        return (pixels.astype(np.float32) - MEAN) * SCALE
    from stpp.device import constant  # torch is there: it made the tensor

    mean, scale = (constant(tuple(values.tolist()), pixels.device) for values in (MEAN, SCALE))
    return pixels.float().sub_(mean).mul_(scale)
