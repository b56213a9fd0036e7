"""PNG and JPEG headers beyond what Pillow exposes: the properties that decide which decoders agree on a file.

The only reader of PNG headers. Nothing is decoded here; hostile bytes give None or an early end, never an
error.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = 33
"""Length of the signature and the first chunk."""
GRAY, RGB, PALETTE, GRAY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
"""PNG colour types."""
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
_STARTS_SCAN, _STANDALONE = 0xDA, (0x01, *range(0xD0, 0xD8))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class PngHeader(NamedTuple):
    """Fields of a PNG's first chunk."""

    width: int
    height: int
    bits: int
    """Bits per channel."""
    kind: int
    """Colour type."""
    interlaced: bool


class Frame(NamedTuple):
    """Fields of a JPEG's frame header."""

    progressive: bool
    """True: progressive; False: baseline or extended sequential."""
    huffman: bool
    """True: Huffman coding; False: arithmetic coding."""
    bits: int
    components: tuple[tuple[int, int, int], ...]
    """(identifier, horizontal, vertical sampling factor) of each component."""
    jfif: bool
    adobe: int | None
    """Colour transform of Adobe's marker: 0 none, 1 YCbCr, 2 YCCK; None: no marker."""


def png_header(data: bytes) -> PngHeader | None:
    """Header of a PNG from its first bytes; None for other files or a truncated header."""
    if data[:8] != PNG_SIGNATURE or data[12:16] != b"IHDR" or len(data) < 29:
        return None
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    return PngHeader(width, height, bits, kind, bool(interlaced))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, first byte of the content, length) of a PNG's chunks, as far as the bytes go."""
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        yield name, at + 8, length
        if name == b"IEND":
            return
        at += length + 12


def png_exif(data: bytes, tail: bytes = b"") -> bytes | None:
    """First eXIf chunk of a PNG, before or after its pixels; None without one.

    Args:
        data: the file, or its beginning.
        tail: the end of the file, if `data` is only its beginning.
    """
    for name, start, length in png_chunks(data):
        if name == b"eXIf" and start + length <= len(data):
            return data[start : start + length]
    at = tail.find(b"eXIf")
    while at >= 0:
        # The tail may begin anywhere: length and checksum distinguish a chunk from pixels with its name.
        length = int.from_bytes(tail[at - 4 : at], "big") if at >= 4 else len(tail)
        end = at + 4 + length
        if tail[end : end + 4] == struct.pack(">I", zlib.crc32(tail[at:end])) and end + 4 <= len(tail):
            return tail[at + 4 : end]
        at = tail.find(b"eXIf", at + 1)
    return None


def jpeg_frame(data: bytes) -> Frame | None:
    """Frame header of a JPEG with contiguous segments up to its first scan; None for any other file."""
    at, jfif, adobe, frame = 2, False, None, None
    if data[:2] != b"\xff\xd8":
        return None
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in _STANDALONE:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : at + 2 + length]
        if marker == _STARTS_SCAN:
            return frame and frame._replace(jfif=jfif, adobe=adobe)
        if length < 2 or len(content) != length - 2:
            return None
        if marker == 0xE0 and content[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and content[:5] == b"Adobe" and len(content) >= 12:
            adobe = content[11]
        elif marker in _FRAMES:
            if frame is not None or len(content) < 6 + 3 * content[5]:
                return None
            components = tuple(
                (content[6 + 3 * i], content[7 + 3 * i] >> 4, content[7 + 3 * i] & 15)
                for i in range(content[5])
            )
            # Low bits of the marker: 0 baseline, 1 extended, 2 progressive; then lossless, hierarchical
            # and arithmetic kinds.
            frame = Frame(marker == 0xC2, marker in (0xC0, 0xC1, 0xC2), content[0], components, False, None)
        at += 2 + length
    return None


def looks_whole(data: bytes) -> bool:
    """True if a JPEG or PNG ends properly, without trailing bytes; decoders disagree on files that do not."""
    return data.endswith(_JPEG_END if data.startswith(b"\xff\xd8") else _PNG_END)
