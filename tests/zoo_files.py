"""Image files made byte by byte, which no library of the tests writes, but which occur. See zoo_cases."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 56
"""Size of the picture, upright; not a multiple of a block of a subsampled JPEG."""
ORIENTATION = 0x0112
TURNS = {  # from the upright picture to the stored one
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}


def picture() -> np.ndarray:
    """Draws uint8 [HEIGHT, WIDTH, 3]: smooth, so that JPEG preserves it, with different corners, so that a
    wrong turn shows."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = (40 + 3.2 * x, 30 + 4 * y, 200 - 2 * x - 1.5 * y)
    out = np.stack(channels, axis=2)
    out[4:14, 6:20] = (220, 40, 40)
    return out.clip(0, 255).astype(np.uint8)


def gray() -> np.ndarray:
    """Returns uint8 [HEIGHT, WIDTH]: the picture's first channel."""
    return picture()[..., 0]


def repeated(gray_HW: np.ndarray) -> np.ndarray:
    """Repeats a gray image as three equal channels."""
    return np.repeat(gray_HW[..., None], 3, axis=2)


def exif_block(value: object = 6, *, kind: int = 3, count: int = 1, big: bool = True,
               prefix: bytes = b"Exif\0\0") -> bytes:
    """Builds an EXIF block that holds only an orientation; `kind` is its TIFF type: 1 byte, 2 text, 3 short,
    4 long, 5 rational."""
    order = ">" if big else "<"
    packed = {1: lambda: bytes([value] * count), 2: lambda: b"%d\0" % value,
              3: lambda: struct.pack(f"{order}{count}H", *[value] * count),
              4: lambda: struct.pack(f"{order}I", value),
              5: lambda: struct.pack(f"{order}II", value, 1)}[kind]()
    beyond = b""
    if len(packed) > 4:
        beyond, packed = packed, struct.pack(f"{order}I", 26)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", 1)
    return prefix + head + struct.pack(f"{order}HHI", ORIENTATION, kind,
                                       2 if kind == 2 else count) + packed.ljust(4,
                                                                                 b"\0") + b"\0" * 4 + beyond


def saved(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """Encodes an image with Pillow."""
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(image=None, **options) -> bytes:
    return saved(picture() if image is None else image, "JPEG",
                 **{"quality": 95, "subsampling": 0, **options})


def segment(marker: int, payload: bytes) -> bytes:
    """Builds a JPEG segment."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """Inserts segments at the start of a JPEG."""
    return data[:2] + b"".join(segments) + data[2:]


def without_segment(data: bytes, marker: int) -> bytes:
    """Removes a JPEG's first segment of this marker."""
    at = data.find(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2:at + 4])[0]:]


def chunk(name: bytes, payload: bytes) -> bytes:
    """Builds a PNG chunk."""
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(values: np.ndarray, bits: int, kind: int, *, before: bytes = b"", after: bytes = b"",
        interlaced: bool = False) -> bytes:
    """Builds a PNG of stored values [H, W] or [H, W, C], with further chunks before and after its pixels."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape

    def packed(part: np.ndarray) -> bytes:
        rows = part.reshape(part.shape[0], -1)
        if bits == 16:
            raw = rows.astype(">u2").view(np.uint8).reshape(len(rows), -1)
        elif bits == 8:
            raw = rows.astype(np.uint8)
        else:
            flags = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
            raw = np.packbits(flags.reshape(len(rows), -1).astype(np.uint8), axis=1)
        return b"".join(b"\0" + row.tobytes() for row in raw)

    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
                  (1, 0, 2, 1)]
        stream = b"".join(packed(part) for y, x, dy, dx in passes if (part := values[y::dy, x::dx]).size)
    else:
        stream = packed(values)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT",
                                                                           zlib.compress(stream)) + after
            + chunk(b"IEND", b""))


def tiff(values: np.ndarray, *, sample_format: int = 1, photometric: int | None = None,
         orientation: bytes | None = None,
         big: bool = False) -> bytes:
    """Builds an uncompressed TIFF of one strip of values [H, W] or [H, W, C] as they are in memory.

    Args:
        sample_format: 1 unsigned, 2 signed, 3 floating point.
        orientation: the tag's entry, 12 bytes; None: no tag.
    """
    order = ">" if big else "<"
    values = values.astype(values.dtype.newbyteorder(order))
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    bits = values.dtype.itemsize * 8
    photometric = (2 if channels == 3 else 1) if photometric is None else photometric
    data = values.tobytes()
    extra = struct.pack(f"{order}{channels}H", *[bits] * channels)
    where = 8 + len(data) + len(extra)
    tags = [(256, 4, 1, width), (257, 4, 1, height),
            (258, 3, channels, bits if channels == 1 else 8 + len(data)),
            (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, channels),
            (278, 4, 1, height),
            (279, 4, 1, len(data)), (284, 3, 1, 1), (339, 3, 1, sample_format)]

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        short = kind == 3 and count == 1
        return struct.pack(f"{order}HHI", tag, kind, count) + (struct.pack(f"{order}HH", value, 0) if short
                                                                else struct.pack(f"{order}I", value))

    entries = [(tag, entry(tag, *rest)) for tag, *rest in tags]
    if orientation is not None:
        entries.append((ORIENTATION, orientation))
    entries = [one for _, one in sorted(entries, key=lambda pair: pair[0])]
    return ((b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", where) + data + extra
            + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0" * 4)


def riff(data: bytes, *chunks: bytes, flags: int) -> bytes:
    """Converts a simple WebP to an extended one, with further chunks after its pixels."""
    body, (width, height) = data[12:], (struct.pack("<I", side - 1)[:3] for side in (WIDTH, HEIGHT))
    head = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + width + height
    body = b"WEBP" + head + body + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def bmp(values: np.ndarray, bits: int, colours: bytes = b"", *, top_down: bool = False,
        masks: bytes = b"") -> bytes:
    """Builds a BMP of rows of bytes already packed: uint8 [H, bytes of a row]."""
    height = len(values)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 4)))
    pixels = (padded if top_down else padded[::-1]).tobytes()
    start = 54 + len(masks) + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, -height if top_down else height, 1, bits,
                         3 if masks else 0, len(pixels), 0, 0,
                         len(colours) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + colours + pixels


def ycck(cmyk_HWC: np.ndarray) -> bytes:
    """Builds a JPEG of inverted YCCK: the first three channels are the YCbCr of the inverted inks, and the
    marker declares transform 2."""
    inverted = 255 - cmyk_HWC
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(255 - inverted[..., :3])).convert("YCbCr"))
    four = np.concatenate([ycc, inverted[..., 3:]], axis=2)
    data = jpeg(Image.fromarray(255 - four, "CMYK"))
    at = data.find(b"Adobe")
    return data[:at + 11] + b"\2" + data[at + 12:]


def scans(sampling: tuple[int, int]) -> bytes:
    """Builds a baseline JPEG of the picture with these factors of the luma, one scan a component: 4:4:4,
    4:1:1, 4:4:0 and so on.

    Each scan is taken from a gray JPEG of the component, because Pillow writes few samplings; all use the
    same tables.
    """
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(picture()).convert("YCbCr")), 2, 0)
    h, v = sampling
    small = (-(-WIDTH // h), -(-HEIGHT // v))
    planes = [luma,
              *(np.asarray(Image.fromarray(plane.copy()).resize(small,
                                                                Image.Resampling.BOX)) for plane in chroma)]
    grays = [jpeg(plane) for plane in planes]
    tables = b"".join(one for marker, one in segments(grays[0]) if marker in (0xDB, 0xC4))
    parts = b"".join(bytes([number, factors, 0]) for number,
                     factors in ((1, h << 4 | v), (2, 0x11), (3, 0x11)))
    frame = segment(0xC0, struct.pack(">BHHB", 8, HEIGHT, WIDTH, 3) + parts)
    out = b"\xff\xd8" + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") + tables + frame
    for number, gray_jpeg in enumerate(grays, 1):
        coded = gray_jpeg[sum(len(one) for _, one in segments(gray_jpeg)) + 2:-2]
        out += segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + coded
    return out + b"\xff\xd9"


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """Lists (marker, bytes) of the segments of a JPEG up to its first scan's header, including that one."""
    at, found = 2, []
    while not found or found[-1][0] != 0xDA:
        length = 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
        found.append((data[at + 1], data[at:at + length]))
        at += length
    return found
