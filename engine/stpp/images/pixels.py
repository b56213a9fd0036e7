"""One image file in memory: its header, and its pixels as PIL reads them.

What is bad is decided here alone, whichever decoder a run uses. H W: pixels.
"""

import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from stpp.device import constant
from stpp.images.image_file import DECODE_ERRORS, IMAGE_FORMATS, IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS, orientation, upright_size

MEAN = np.array(IMAGENET_MEAN, dtype=np.float32) * 255
SCALE = 1 / (np.array(IMAGENET_STD, dtype=np.float32) * 255)
"""A pixel is normalised as (pixel - MEAN) * SCALE; float32 [3] each."""
_DEEP = ("I", "I;16", "I;16B", "I;16L")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class BadImage(Exception):
    """An image that cannot be labelled; the message is the reason, in a few words without the name."""


class Header(NamedTuple):
    """What the beginning of a file tells."""

    width: int
    """Pixels, upright."""
    height: int
    """Pixels, upright."""
    orientation: int
    """EXIF orientation to turn it by, 1 to 8; 1 where EXIF is not looked at."""
    plain: bool
    """Whether any decoder makes the same of it: an 8-bit JPEG or PNG in gray or RGB."""


def header(data: bytes, *, exif: bool) -> Header:
    """Reads the header of a file, or of the beginning of one.

    Raises:
        BadImage: no image, damaged, or of more pixels than are ever decoded.
    """
    try:
        with _opened(data) as image:
            turn = orientation(image) if exif else 1
            width, height = upright_size(*image.size, turn)
            return Header(width, height, turn, _is_plain(image, data))
    except DECODE_ERRORS as error:
        raise BadImage(_reason(error, data)) from None


def decode(data: bytes) -> np.ndarray:
    """Colours of a whole file as they are stored, not turned: uint8 [H, W, 3].

    16 bits a channel are cut to their upper 8; alpha is dropped; CMYK and palettes become RGB.

    Raises:
        BadImage: no image, damaged, cut short, too large, or of a kind that has no colours.
    """
    try:
        with _opened(data) as image:
            return colours(image)
    except DECODE_ERRORS as error:
        raise BadImage(_reason(error, data)) from None


def colours(image: Image.Image) -> np.ndarray:
    """See `decode`; of an image that Pillow has opened.

    Raises:
        BadImage: of a kind that has no colours.
        Exception: one of `DECODE_ERRORS`, where it cannot be decoded.
    """
    if image.mode in _DEEP:
        return _from_deep(np.asarray(image))
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers")
    return np.asarray(image.convert("RGB"))


def looks_whole(data: bytes) -> bool:
    """Whether a JPEG or PNG ends as it should: decoders differ in what they make of one that does not."""
    if data.startswith(b"\xff\xd8"):
        return data.endswith(b"\xff\xd9")
    return data.endswith(b"IEND\xaeB`\x82")


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS} that are ever decoded")
    if image.width < 1 or image.height < 1:
        raise BadImage(f"it has no pixels ({image.width}x{image.height})")
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        # Pillow calls 16 bits a channel RGB too.
        return data[:8] == _PNG_SIGNATURE and data[24:25] == b"\x08" and data[25:26] in (b"\0", b"\x02") \
            and "transparency" not in image.info
    return image.format == "JPEG" and image.mode in ("L", "RGB")


def _from_deep(values_HW: np.ndarray) -> np.ndarray:
    """Gray of up to 16 bits to uint8 [H, W, 3]: the upper 8 of 16 bits."""
    if values_HW.size and (values_HW.min() < 0 or values_HW.max() > 65535):
        raise BadImage("its pixels have more than 16 bits")
    return np.repeat((values_HW >> 8).astype(np.uint8)[..., None], 3, axis=2)


def _reason(error: Exception, data: bytes) -> str:
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


def normalised(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [H, W, 3] with ImageNet mean and standard deviation."""
    return (image - MEAN) * SCALE


def normalised_batch(pixels_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W], channels_last, on their device; equals `normalised` to the bit."""
    mean, scale = (constant(tuple(values.tolist()), pixels_NHWC.device) for values in (MEAN, SCALE))
    return pixels_NHWC.float().sub_(mean).mul_(scale).permute(0, 3, 1, 2)
