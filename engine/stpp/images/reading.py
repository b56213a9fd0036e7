"""The decision how an image file is decoded; made and stored by `prepare` and by a corpus's plan.

The rules:

- **Orientation** is the EXIF tag 0x0112 of the file's first EXIF block: the first EXIF segment of a JPEG, the
first eXIf chunk of a PNG (before or after its pixels), the EXIF chunk of a WebP, the first directory of a
TIFF. It is valid if it is a number from 1 to 8 of any numeric type, the first of several; text, bytes and
damaged blocks are ignored, as are XMP and text chunks. Only a file's first picture is read.
- **Colours** become 8-bit RGB: the upper 8 bits of 12 and 16, the upper 8 of 16 for 32; gray is repeated
three times; palettes are expanded; alpha is dropped. A CMYK JPEG with Adobe's marker holds inverted inks, one
without holds plain inks (as in libjpeg's manual, libvips, img2pdf and DALI; Pillow and browsers invert both);
TIFF inks are never inverted. Floating-point numbers, negative numbers and numbers above 16 bits are rejected.
- **Plain** files are those that DALI and PIL decode to the same pixels: 8-bit JPEG, baseline or progressive,
Huffman-coded, gray or YCbCr in 4:4:4, 4:2:2 or 4:2:0, with one picture; 8-bit PNG, gray or RGB, not
interlaced, without transparency or animation; complete, without trailing bytes. PIL decodes everything else,
with any loader.

Width and height: pixels. This module imports neither torch nor pyarrow.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from stpp.images import containers
from stpp.images.image_file import DECODE_ERRORS, exif_orientation, orientation, upright, upright_size
from stpp.images.pixels import (
    BadImage,
    colours,
    decode,
    describe_error,
    opened_bytes,
    range_bits,
    stored_bits,
)

SPARE_BITS = 2
"""Unused top bits above which a deep image is dark: with at least this many, it uses at most a quarter of its
range."""
FEW_COLOURS, LEAST_PIXELS = 16, 1024
"""An image of at least `LEAST_PIXELS` with 2 to `FEW_COLOURS` colours looks like a mask."""
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa", "La")
_SAMPLINGS = (((1, 1),), ((1, 1),) * 3, ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1)))
_IDENTIFIERS = ((1,), (0,), (1, 2, 3), (0, 1, 2))
_NOT_PLAIN_CHUNKS = frozenset((b"tRNS", b"acTL", b"fcTL", b"fdAT", b"CgBI"))


class Reading(NamedTuple):
    """Decoding parameters and properties of a file."""

    width: int
    """After rotation."""
    height: int
    """After rotation."""
    orientation: int
    """EXIF orientation to rotate by, 1 to 8; 1 if EXIF is ignored."""
    plain: bool
    """True if every decoder gives the same pixels."""
    format: str = ""
    """Pillow's format name: JPEG, PNG, BMP, TIFF, WEBP, PPM; MPO is a JPEG of several pictures."""
    colours: str = ""
    """gray, RGB, palette, CMYK, inverted CMYK, or another Pillow mode."""
    alpha: bool = False
    """True if it has an alpha channel or a transparent colour, which is dropped."""
    bits: int = 8
    """Stored bits per channel."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after rotation."""
        return self.height, self.width

    def as_stored(self) -> "Reading":
        """The reading without rotation."""
        width, height = upright_size(self.width, self.height, self.orientation)
        return self._replace(width=width, height=height, orientation=1)


def read_header(data: bytes, *, exif: bool, tail: bytes = b"") -> Reading:
    """Determines the reading of a file from its bytes or its beginning.

    Args:
        data: the file, or a beginning that contains the whole header.
        exif: rotate it upright by its EXIF orientation.
        tail: the end of the file, if `data` is only its beginning: a PNG may store its orientation there.

    Raises:
        BadImage: not an image, damaged, or too large.
    """
    try:
        with opened_bytes(data) as image:
            reading = _reading(image, data, tail)
    except DECODE_ERRORS as error:
        raise BadImage(describe_error(error)) from None
    return reading if exif else reading.as_stored()


def _reading(image: Image.Image, data: bytes, tail: bytes = b"") -> Reading:
    """Reading of an image that Pillow has opened but not decoded."""
    turn = _turn(image, data, tail)
    # For TIFF, Pillow gives the upright size; for other formats, the stored size.
    stored = upright_size(*image.size, turn) if image.format == "TIFF" else image.size
    width, height = upright_size(*stored, turn)
    return Reading(
        width,
        height,
        turn,
        image.format in ("JPEG", "PNG") and _is_plain(data),
        image.format,
        _colours(image),
        image.mode in _ALPHA_MODES or "transparency" in image.info,
        _bits(image, data),
    )


def upright_pixels(data: bytes, reading: Reading) -> np.ndarray:
    """Pixels of a file, decoded by its reading: uint8 [H, W, 3], a view.

    Raises:
        BadImage: see `decode`; or the size differs from the reading.
    """
    pixels = upright(decode(data), reading.orientation)
    require_size(pixels.shape[:2], reading)
    return pixels


def require_size(size: tuple[int, int], reading: Reading) -> None:
    """Rejects pixels whose size (height, width) differs from their reading.

    Raises:
        BadImage: the sizes differ.
    """
    if tuple(size) != reading.size:
        raise BadImage(
            f"it has {size[1]}x{size[0]} pixels but had {reading.width}x{reading.height} when it was checked"
        )


class DecodeFindings(NamedTuple):
    """Findings from decoding a whole file."""

    used_bits: int
    """Bits that its values use; its bit depth if at most 8."""
    like_mask: bool = False
    """True for images of few flat colours, see `FEW_COLOURS`; never for JPEGs."""


def check_decodable(data: bytes) -> tuple[Reading, DecodeFindings]:
    """Decodes a whole file as a check; a JPEG at an eighth of its size, which reads all data with little
    arithmetic.

    Returns:
        the reading, rotated upright, and the findings.

    Raises:
        BadImage: see `read_header` and `decode`.
    """
    try:
        with opened_bytes(data) as image:
            reading = _reading(image, data)
            num_used_bits = reading.bits
            if reading.bits <= 8 and reading.colours in ("RGB", "gray"):
                image.draft(None, (1, 1))
                image.load()
            else:
                pixels_HWC = colours(image)
                num_used_bits, image = used_bits(pixels_HWC, reading), Image.fromarray(pixels_HWC)
            return reading, DecodeFindings(num_used_bits, _is_like_mask(image, reading))
    except DECODE_ERRORS as error:
        raise BadImage(describe_error(error)) from None


def _is_like_mask(image: Image.Image, reading: Reading) -> bool:
    if reading.format in ("JPEG", "MPO") or reading.width * reading.height < LEAST_PIXELS:
        return False
    return len(image.getcolors(FEW_COLOURS) or ()) > 1


def used_bits(pixels_HWC: np.ndarray, reading: Reading) -> int:
    """Bits needed by an image's largest value; for more than 8 bits, the bits below the upper 8 count as
    used."""
    largest = int(pixels_HWC.max())
    unseen = range_bits(reading.bits) - 8 if reading.bits > 8 else 0
    return unseen + largest.bit_length()


def uses_few(used: int, reading: Reading) -> bool:
    """True if an image of more than 8 bits uses so few that it looks nearly black, such as 12 bits in 16."""
    return reading.bits > 8 and used <= range_bits(reading.bits) - SPARE_BITS


def is_dark(pixels_HWC: np.ndarray, reading: Reading) -> bool:
    """`uses_few` for decoded pixels."""
    return uses_few(used_bits(pixels_HWC, reading), reading)


def _turn(image: Image.Image, data: bytes, tail: bytes) -> int:
    if image.format == "PNG":
        block = containers.png_exif(data, tail)
        return exif_orientation(block) if block else 1
    return orientation(image)


def _colours(image: Image.Image) -> str:
    if image.mode == "CMYK":
        return "inverted CMYK" if "adobe" in image.info else "CMYK"
    if image.mode in _GRAY_MODES:
        return "gray"
    return {"P": "palette", "PA": "palette", "F": "float", "RGBA": "RGB", "RGBa": "RGB", "RGBX": "RGB"}.get(
        image.mode, image.mode
    )


def _bits(image: Image.Image, data: bytes) -> int:
    return containers.png_header(data).bits if image.format == "PNG" else stored_bits(image)


def _is_plain(data: bytes) -> bool:
    """Checks the rules above; the end of the file is checked elsewhere
    (`stpp.images.containers.looks_whole`)."""
    if (png := containers.png_header(data)) is not None:
        return (
            png.bits == 8
            and png.kind in (containers.GRAY, containers.RGB)
            and not png.interlaced
            and not any(name in _NOT_PLAIN_CHUNKS for name, _, _ in containers.png_chunks(data))
        )
    frame = containers.jpeg_frame(data)
    return (
        frame is not None
        and frame.huffman
        and frame.bits == 8
        and frame.adobe in (None, 1)
        and tuple(part[1:] for part in frame.components) in _SAMPLINGS
        and tuple(part[0] for part in frame.components) in _IDENTIFIERS
    )
