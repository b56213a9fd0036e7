"""The one decision of how an image file is read: made by `prepare` and by a corpus's plan, which keep it.

The rules:

- **Orientation** is the EXIF tag 0x0112 of the first EXIF block of the file, wherever that lies: the first
  EXIF segment of a JPEG, the first eXIf chunk of a PNG (before or after its pixels), the EXIF chunk of a
  WebP, the first directory of a TIFF. It counts if it is a number from 1 to 8, of whatever numeric type, the
  first where there are several; text, bytes and damaged blocks do not. XMP and text chunks are not looked at.
  Only the first picture of a file is.
- **Colours** become 8-bit RGB: of 12 and 16 bits the upper 8, of 32 the upper 8 of 16; gray three times;
  palettes by their table; alpha is dropped. A CMYK JPEG with Adobe's marker holds inverted inks, one without
  holds inks as they are (as libjpeg's manual, libvips, img2pdf and DALI have it; Pillow and browsers take
  both for inverted); in a TIFF inks are never inverted. Floating-point numbers, negative numbers and numbers
  of more than 16 bits are refused.
- **Plain** is what DALI and PIL decode to the same pixels: 8-bit JPEG, baseline or progressive,
  Huffman-coded, gray or YCbCr in 4:4:4, 4:2:2 or 4:2:0, of one picture; 8-bit PNG, gray or RGB, not
  interlaced, without transparency or animation; whole, with nothing behind their end. Everything else is
  decoded by PIL alone, whichever loader is used.

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
    opened_bytes,
    range_bits,
    stored_bits,
    why,
)

SPARE_BITS = 2
"""An image of more than 8 bits whose largest number leaves as many unused has at most a quarter of its range:
a network sees it dark."""
FEW_COLOURS, LEAST_PIXELS = 16, 1024
"""A picture of so many pixels with no more colours, and with two at least, looks like a mask."""
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa", "La")
_SAMPLINGS = (((1, 1),), ((1, 1),) * 3, ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 1), (1, 1)))
_IDENTIFIERS = ((1,), (0,), (1, 2, 3), (0, 1, 2))
_NOT_PLAIN_CHUNKS = frozenset((b"tRNS", b"acTL", b"fcTL", b"fdAT", b"CgBI"))


class Reading(NamedTuple):
    """How a file is read, and what it is."""

    width: int
    """After the turn."""
    height: int
    """After the turn."""
    orientation: int
    """EXIF orientation to turn it by, 1 to 8; 1 where EXIF is not looked at."""
    plain: bool
    """Whether every decoder makes the same of it."""
    format: str = ""
    """Pillow's name of the format: JPEG, PNG, BMP, TIFF, WEBP, PPM; MPO is a JPEG of several pictures."""
    colours: str = ""
    """gray, RGB, palette, CMYK, inverted CMYK, or another mode of Pillow's."""
    alpha: bool = False
    """Whether it has an alpha channel or a transparent colour, which is dropped."""
    bits: int = 8
    """A channel, as stored."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) after the turn."""
        return self.height, self.width

    def as_stored(self) -> "Reading":
        """The reading without the turn."""
        width, height = upright_size(self.width, self.height, self.orientation)
        return self._replace(width=width, height=height, orientation=1)


def look(data: bytes, *, exif: bool, tail: bytes = b"") -> Reading:
    """Decides how a file is to be read, from its bytes or its beginning.

    Args:
        data: the file, or so much of its beginning that its header is whole.
        exif: turn it upright by its EXIF orientation.
        tail: the end of the file, where `data` is its beginning alone: a PNG may have its orientation there.

    Raises:
        BadImage: no image, damaged, or of more pixels than are ever decoded.
    """
    try:
        with opened_bytes(data) as image:
            found = _reading(image, data, tail)
    except DECODE_ERRORS as error:
        raise BadImage(why(error)) from None
    return found if exif else found.as_stored()


def _reading(image: Image.Image, data: bytes, tail: bytes = b"") -> Reading:
    """See `look`; of an image that Pillow has opened and not yet decoded."""
    turn = _turn(image, data, tail)
    # Of a TIFF Pillow tells the upright size, of the others the stored one.
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
    """The pixels of a file by its reading: uint8 [H, W, 3], a view.

    Raises:
        BadImage: see `decode`; or the file is of another size than its reading says.
    """
    pixels = upright(decode(data), reading.orientation)
    require_size(pixels.shape[:2], reading)
    return pixels


def require_size(size: tuple[int, int], reading: Reading) -> None:
    """Refuses pixels of another size (height, width) than their reading says.

    Raises:
        BadImage: they are.
    """
    if tuple(size) != reading.size:
        raise BadImage(
            f"it has {size[1]}x{size[0]} pixels where it had {reading.width}x{reading.height} when it was "
            "looked at"
        )


class Proof(NamedTuple):
    """Findings about a file that was decoded to its end."""

    used_bits: int
    """Bits that it uses: its form's, if 8 at most."""
    like_mask: bool = False
    """True for a few flat colours, see `FEW_COLOURS`; a JPEG never has so few."""


def prove(data: bytes) -> tuple[Reading, Proof]:
    """Decodes a whole file to see that it can be; a JPEG at an eighth of its size, which reads all data but
    saves most arithmetic.

    Returns:
        its reading, turned upright, and the findings.

    Raises:
        BadImage: see `look` and `decode`.
    """
    try:
        with opened_bytes(data) as image:
            reading = _reading(image, data)
            used = reading.bits
            if reading.bits <= 8 and reading.colours in ("RGB", "gray"):
                image.draft(None, (1, 1))
                image.load()
            else:
                pixels_HWC = colours(image)
                used, image = used_bits(pixels_HWC, reading), Image.fromarray(pixels_HWC)
            return reading, Proof(used, _is_like_mask(image, reading))
    except DECODE_ERRORS as error:
        raise BadImage(why(error)) from None


def _is_like_mask(image: Image.Image, reading: Reading) -> bool:
    if reading.format in ("JPEG", "MPO") or reading.width * reading.height < LEAST_PIXELS:
        return False
    return len(image.getcolors(FEW_COLOURS) or ()) > 1


def used_bits(pixels_HWC: np.ndarray, reading: Reading) -> int:
    """Bits that the largest number of an image needs; of more than 8 bits at least those below the upper 8,
    which are not looked at."""
    largest = int(pixels_HWC.max())
    unseen = range_bits(reading.bits) - 8 if reading.bits > 8 else 0
    return unseen + largest.bit_length()


def uses_few(used: int, reading: Reading) -> bool:
    """True if an image of more than 8 bits uses so few of them that it looks nearly black, as 12 bits in 16
    do."""
    return reading.bits > 8 and used <= range_bits(reading.bits) - SPARE_BITS


def is_dark(pixels_HWC: np.ndarray, reading: Reading) -> bool:
    """See `uses_few`; of the decoded pixels."""
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
    """See the rules above; the end of the file is judged where all of it is there
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
