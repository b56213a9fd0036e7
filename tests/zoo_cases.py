"""Image files of every kind that people have, made from one picture, with the pixels that each of them shows.

A kind is a function from a generator of random numbers to the bytes of a file. `truth` is what must be seen of it, upright, where that
follows from the kind alone; lossy kinds are compared with each other (all ways of reading, one against the other) and roughly with
the picture.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 56
"""Of the picture, upright; no multiple of a block of a subsampled JPEG."""
ORIENTATION = 0x0112
TURNS = {  # of the upright picture, to what is stored
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
}


def picture() -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]: smooth, no two corners alike, so that JPEG keeps it and a wrong turn shows."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = (40 + 3.2 * x, 30 + 4 * y, 200 - 2 * x - 1.5 * y)
    out = np.stack(channels, axis=2)
    out[4:14, 6:20] = (220, 40, 40)
    return out.clip(0, 255).astype(np.uint8)


def gray() -> np.ndarray:
    """uint8 [HEIGHT, WIDTH]: the picture's first channel."""
    return picture()[..., 0]


def repeated(gray_HW: np.ndarray) -> np.ndarray:
    """A gray image as three equal channels."""
    return np.repeat(gray_HW[..., None], 3, axis=2)


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    """With the extension."""
    data: bytes
    truth: np.ndarray | None = None
    """uint8 [H, W, 3] upright; None: refused."""
    near: float = 0.0
    """Grey levels by which the truth may be missed on average: 0 for lossless kinds."""
    plain: bool = False
    """Whether DALI is given the file."""
    refused: str | None = None
    """Part of the reason where it is refused."""


def exif_block(value: object = 6, *, kind: int = 3, count: int = 1, big: bool = True, prefix: bytes = b"Exif\0\0") -> bytes:
    """An EXIF block that holds an orientation alone; `kind` is its TIFF type: 1 byte, 2 text, 3 short, 4 long, 5 rational."""
    order = ">" if big else "<"
    packed = {1: lambda: bytes([value] * count), 2: lambda: b"%d\0" % value, 3: lambda: struct.pack(f"{order}{count}H", *[value] * count),
              4: lambda: struct.pack(f"{order}I", value), 5: lambda: struct.pack(f"{order}II", value, 1)}[kind]()
    beyond = b""
    if len(packed) > 4:
        beyond, packed = packed, struct.pack(f"{order}I", 26)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8) + struct.pack(f"{order}H", 1)
    return prefix + head + struct.pack(f"{order}HHI", ORIENTATION, kind, 2 if kind == 2 else count) + packed.ljust(4, b"\0") + b"\0" * 4 + beyond


def saved(image: np.ndarray | Image.Image, form: str, **options) -> bytes:
    """An image as Pillow writes it."""
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(image=None, **options) -> bytes:
    return saved(picture() if image is None else image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def segment(marker: int, payload: bytes) -> bytes:
    """A JPEG segment."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with further segments at its beginning."""
    return data[:2] + b"".join(segments) + data[2:]


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG without its first segment of this marker."""
    at = data.find(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2:at + 4])[0]:]


def chunk(name: bytes, payload: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def png(values: np.ndarray, bits: int, kind: int, *, before: bytes = b"", after: bytes = b"", interlaced: bool = False) -> bytes:
    """A PNG of stored values [H, W] or [H, W, C], with further chunks before and after its pixels."""
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
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        stream = b"".join(packed(part) for y, x, dy, dx in passes if (part := values[y::dy, x::dx]).size)
    else:
        stream = packed(values)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(stream)) + after
            + chunk(b"IEND", b""))


def tiff(values: np.ndarray, *, sample_format: int = 1, photometric: int | None = None, orientation: bytes | None = None,
         big: bool = False) -> bytes:
    """An uncompressed TIFF of one strip of values [H, W] or [H, W, C] as they are in memory.

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
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, bits if channels == 1 else 8 + len(data)),
            (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, channels), (278, 4, 1, height),
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
    """A simple WebP as an extended one, with further chunks behind its pixels."""
    body = data[12:]
    head = b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    body = b"WEBP" + head + body + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def bmp(values: np.ndarray, bits: int, colours: bytes = b"", *, top_down: bool = False, masks: bytes = b"") -> bytes:
    """A BMP of rows of bytes already packed: uint8 [H, bytes of a row]."""
    height = len(values)
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 4)))
    pixels = (padded if top_down else padded[::-1]).tobytes()
    start = 54 + len(masks) + len(colours)
    header = struct.pack("<IiiHHIIiiII", 40, WIDTH, -height if top_down else height, 1, bits, 3 if masks else 0, len(pixels), 0, 0,
                         len(colours) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + masks + colours + pixels


def _jpegs() -> list[Kind]:
    rgb, flat = picture(), gray()
    near = {"near": 4.0}
    kinds = [
        Kind("plain.jpg", jpeg(), rgb, plain=True, **near),
        Kind("jfif.jfif", jpeg(), rgb, plain=True, **near),
        Kind("jpe.jpe", jpeg(), rgb, plain=True, **near),
        Kind("gray.jpg", jpeg(flat), repeated(flat), plain=True, **near),
        Kind("progressive.jpg", jpeg(progressive=True), rgb, plain=True, **near),
        Kind("optimised.jpg", jpeg(optimize=True), rgb, plain=True, **near),
        Kind("quality30.jpg", jpeg(quality=30), rgb, plain=True, near=9.0),
        Kind("s422.jpg", jpeg(subsampling=1), rgb, plain=True, near=9.0),
        Kind("s420.jpg", jpeg(subsampling=2), rgb, plain=True, near=9.0),
        Kind("s420progressive.jpg", jpeg(subsampling=2, progressive=True), rgb, plain=True, near=9.0),
        Kind("restart.jpg", jpeg(restart_marker_blocks=2), rgb, plain=True, **near),
        Kind("keep_rgb.jpg", jpeg(keep_rgb=True), rgb, **near),
        Kind("icc.jpg", jpeg(icc_profile=b"\0" * 128), rgb, plain=True, **near),
        Kind("comment.jpg", jpeg(comment=b"a comment"), rgb, plain=True, **near),
        Kind("trailer.jpg", jpeg() + b"MotionPhoto_Data" * 9, rgb, **near),
        Kind("zeros_behind.jpg", jpeg() + b"\0" * 7, rgb, **near),
        Kind("fill_bytes.jpg", with_segments(jpeg(), b"\xff\xff\xff"), rgb, **near),
        Kind("many_segments.jpg", with_segments(jpeg(), *[segment(0xE7, b"x" * 9000)] * 4), rgb, plain=True, **near),
    ]
    for name, sampling, far in (("s444_scans", (1, 1), 4.0), ("s420_scans", (2, 2), 9.0)):
        kinds.append(Kind(f"{name}.jpg", scans(sampling), rgb, plain=True, near=far))
    for name, sampling in (("s411", (4, 1)), ("s440", (1, 2)), ("s410", (4, 2))):
        kinds.append(Kind(f"{name}.jpg", scans(sampling), rgb, near=14.0))
    for turn in range(1, 9):
        kinds.append(Kind(f"turn{turn}.jpg", jpeg(TURNS[turn](rgb), exif=exif_block(turn)), rgb, plain=True, **near))
    six, stored = TURNS[6](rgb), {"near": 4.0}
    kinds += [
        Kind("little_endian.jpg", jpeg(six, exif=exif_block(6, big=False)), rgb, plain=True, **near),
        Kind("long.jpg", jpeg(six, exif=exif_block(6, kind=4)), rgb, plain=True, **near),
        Kind("rational.jpg", jpeg(six, exif=exif_block(6, kind=5)), rgb, plain=True, **near),
        Kind("byte.jpg", jpeg(exif=exif_block(6, kind=1)), rgb, plain=True, **near),
        Kind("text.jpg", jpeg(exif=exif_block(6, kind=2)), rgb, plain=True, **near),
        Kind("two_values.jpg", jpeg(six, exif=exif_block(6, count=2)), rgb, plain=True, **near),
        Kind("zero.jpg", jpeg(exif=exif_block(0)), rgb, plain=True, **near),
        Kind("nine.jpg", jpeg(exif=exif_block(9)), rgb, plain=True, **near),
        Kind("damaged_exif.jpg", jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), rgb, plain=True, **near),
        Kind("two_exif.jpg", with_segments(jpeg(six), segment(0xE1, exif_block(6)), segment(0xE1, exif_block(3))), rgb, plain=True, **near),
        Kind("xmp_then_exif.jpg", with_segments(jpeg(six), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
                                                segment(0xE1, exif_block(6))), rgb, plain=True, **near),
        Kind("xmp_orientation.jpg", with_segments(jpeg(), segment(
            0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')), rgb, plain=True, **near),
        Kind("exif_before_jfif.jpg", with_segments(jpeg(six), segment(0xE1, exif_block(6))), rgb, plain=True, **near),
        Kind("turned_gray.jpg", jpeg(TURNS[8](flat), exif=exif_block(8)), repeated(flat), plain=True, **near),
        Kind("turned_420.jpg", jpeg(six, subsampling=2, exif=exif_block(6)), rgb, plain=True, near=9.0),
    ]
    mpo = io.BytesIO()
    Image.fromarray(rgb).save(mpo, "MPO", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())], quality=95, subsampling=0)
    kinds.append(Kind("two_pictures.jpg", mpo.getvalue(), rgb, **stored))
    cmyk = Image.fromarray(rgb).convert("CMYK")
    marked = jpeg(cmyk)
    kinds += [
        Kind("cmyk.jpg", marked, rgb, near=6.0),
        # Without the marker the numbers are inks as they are: Pillow inverts when it writes, so this is written inverted again.
        Kind("cmyk_unmarked.jpg", without_segment(jpeg(Image.fromarray(255 - np.asarray(cmyk), "CMYK")), 0xEE), rgb, near=6.0),
        Kind("cmyk_turned.jpg", jpeg(Image.fromarray(np.ascontiguousarray(TURNS[6](np.asarray(cmyk))), "CMYK"), exif=exif_block(6)), rgb,
             near=6.0),
        Kind("ycck.jpg", _ycck(np.asarray(cmyk)), rgb, near=6.0),
    ]
    return kinds


def _ycck(cmyk_HWC: np.ndarray) -> bytes:
    """A JPEG of inverted YCCK: the first three channels are the YCbCr of the inverted inks, and the marker says transform 2."""
    inverted = 255 - cmyk_HWC
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(255 - inverted[..., :3])).convert("YCbCr"))
    four = np.concatenate([ycc, inverted[..., 3:]], axis=2)
    data = jpeg(Image.fromarray(255 - four, "CMYK"))
    at = data.find(b"Adobe")
    return data[:at + 11] + b"\2" + data[at + 12:]


def scans(sampling: tuple[int, int]) -> bytes:
    """A baseline JPEG of the picture with these factors of the luma, one scan a component: 4:4:4, 4:1:1, 4:4:0 and so on.

    Each scan is taken from a gray JPEG of the component, because Pillow writes few samplings; all use the same tables.
    """
    luma, *chroma = np.moveaxis(np.asarray(Image.fromarray(picture()).convert("YCbCr")), 2, 0)
    h, v = sampling
    small = (-(-WIDTH // h), -(-HEIGHT // v))
    planes = [luma, *(np.asarray(Image.fromarray(plane.copy()).resize(small, Image.Resampling.BOX)) for plane in chroma)]
    grays = [jpeg(plane) for plane in planes]
    tables = b"".join(one for marker, one in segments(grays[0]) if marker in (0xDB, 0xC4))
    parts = b"".join(bytes([number, factors, 0]) for number, factors in ((1, h << 4 | v), (2, 0x11), (3, 0x11)))
    frame = segment(0xC0, struct.pack(">BHHB", 8, HEIGHT, WIDTH, 3) + parts)
    out = b"\xff\xd8" + segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") + tables + frame
    for number, gray_jpeg in enumerate(grays, 1):
        coded = gray_jpeg[sum(len(one) for _, one in segments(gray_jpeg)) + 2:-2]
        out += segment(0xDA, bytes([1, number, 0, 0, 63, 0])) + coded
    return out + b"\xff\xd9"


def segments(data: bytes) -> list[tuple[int, bytes]]:
    """(marker, bytes) of the segments of a JPEG up to its first scan's header, that one included."""
    at, found = 2, []
    while not found or found[-1][0] != 0xDA:
        length = 2 + struct.unpack(">H", data[at + 2:at + 4])[0]
        found.append((data[at + 1], data[at:at + length]))
        at += length
    return found


def _pngs() -> list[Kind]:
    rgb, flat = picture(), gray()
    alpha = np.tile(np.arange(WIDTH, dtype=np.uint8) * 4, (HEIGHT, 1))
    table = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    indices = (flat // 16).astype(np.uint8)
    palette, clear = chunk(b"PLTE", table[:16].tobytes()), chunk(b"tRNS", bytes(range(0, 256, 16)))
    exif = chunk(b"eXIf", exif_block(6, prefix=b""))
    six = TURNS[6](rgb)
    deep = (flat.astype(np.uint16) << 8) | 77
    deep_rgb = (rgb.astype(np.uint16) << 8) | 201
    kinds = [
        Kind("rgb.png", png(rgb, 8, 2), rgb, plain=True),
        Kind("gray.png", png(flat, 8, 0), repeated(flat), plain=True),
        Kind("interlaced.png", png(rgb, 8, 2, interlaced=True), rgb),
        Kind("interlaced_gray.png", png(flat, 8, 0, interlaced=True), repeated(flat)),
        Kind("rgba.png", png(np.dstack([rgb, alpha]), 8, 6), rgb),
        Kind("gray_alpha.png", png(np.dstack([flat, alpha]), 8, 4), repeated(flat)),
        Kind("colour_key.png", png(rgb, 8, 2, before=chunk(b"tRNS", struct.pack(">3H", *rgb[0, 0].tolist()))), rgb),
        Kind("gray_key.png", png(flat, 8, 0, before=chunk(b"tRNS", struct.pack(">H", int(flat[0, 0])))), repeated(flat)),
        Kind("gray16.png", png(deep, 16, 0), repeated(flat)),
        Kind("rgb16.png", png(deep_rgb, 16, 2), rgb),
        Kind("rgba16.png", png(np.dstack([deep_rgb, alpha.astype(np.uint16) << 8]), 16, 6), rgb),
        Kind("gray_alpha16.png", png(np.dstack([deep, alpha.astype(np.uint16) << 8]), 16, 4), repeated(flat)),
        Kind("gray16_interlaced.png", png(deep, 16, 0, interlaced=True), repeated(flat)),
        Kind("palette8.png", png(indices, 8, 3, before=palette), table[indices]),
        Kind("palette4.png", png(indices, 4, 3, before=palette), table[indices]),
        Kind("palette_clear.png", png(indices, 8, 3, before=palette + clear), table[indices]),
        Kind("palette4_clear.png", png(indices, 4, 3, before=palette + clear), table[indices]),
        Kind("exif_before.png", png(six, 8, 2, before=exif), rgb, plain=True),
        Kind("exif_after.png", png(six, 8, 2, after=exif), rgb, plain=True),
        Kind("exif_after_far.png", png(six, 8, 2, after=exif + chunk(b"tEXt", b"Comment\0" + b"x" * 3000)), rgb, plain=True),
        Kind("exif_gray_after.png", png(TURNS[3](flat), 8, 0, after=chunk(b"eXIf", exif_block(3, prefix=b""))), repeated(flat), plain=True),
        Kind("exif_palette_after.png", png(TURNS[8](indices), 8, 3, before=palette, after=chunk(b"eXIf", exif_block(8, prefix=b""))),
             table[indices]),
        Kind("gamma.png", png(rgb, 8, 2, before=chunk(b"gAMA", struct.pack(">I", 20000))), rgb, plain=True),
        Kind("icc.png", saved(rgb, "PNG", icc_profile=b"\0" * 200), rgb, plain=True),
        Kind("srgb.png", png(rgb, 8, 2, before=chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 45455))), rgb, plain=True),
        Kind("chromaticities.png", png(rgb, 8, 2, before=chunk(b"cHRM", struct.pack(">8I", *range(31000, 39000, 1000)))), rgb, plain=True),
        Kind("background.png", png(rgb, 8, 2, before=chunk(b"bKGD", struct.pack(">3H", 255, 0, 0))), rgb, plain=True),
        Kind("significant.png", png(rgb, 8, 2, before=chunk(b"sBIT", b"\5\5\5")), rgb, plain=True),
        Kind("text.png", png(rgb, 8, 2, before=chunk(b"tEXt", b"Author\0me") + chunk(b"pHYs", struct.pack(">IIB", 2834, 2834, 1))), rgb,
             plain=True),
        Kind("raw_profile.png", png(rgb, 8, 2, before=chunk(
            b"tEXt", b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (32, exif_block(6)[:32].hex().encode()))), rgb, plain=True),
        Kind("trailer.png", png(rgb, 8, 2) + b"behind the end", rgb),
    ]
    for bits in (1, 2, 4):
        values = flat >> (8 - bits)
        seen = (values * (255 // (2**bits - 1))).astype(np.uint8)
        kinds.append(Kind(f"gray{bits}.png", png(values, bits, 0), repeated(seen)))
    two = chunk(b"PLTE", table[:2].tobytes())
    kinds.append(Kind("palette1.png", png(flat >> 7, 1, 3, before=two), table[flat >> 7]))
    four = chunk(b"PLTE", table[:4].tobytes())
    kinds.append(Kind("palette2.png", png(flat >> 6, 2, 3, before=four), table[flat >> 6]))
    return kinds


def _tiffs() -> list[Kind]:
    rgb, flat = picture(), gray()
    kinds = []
    for turn, compression in zip(range(1, 9), ("raw", "tiff_lzw", "tiff_adobe_deflate", "lzma", "packbits", "tiff_lzw", "raw", "zstd"),
                                 strict=True):
        kinds.append(Kind(f"turn{turn}.tif", saved(TURNS[turn](rgb), "TIFF", compression=compression, tiffinfo={ORIENTATION: turn}), rgb))
    six = TURNS[6](rgb)
    kinds += [
        Kind("jpeg.tif", saved(six, "TIFF", compression="jpeg", quality=95, tiffinfo={ORIENTATION: 6}), rgb, near=9.0),
        Kind("long_orientation.tif", tiff(six, orientation=struct.pack("<HHII", ORIENTATION, 4, 1, 6)), rgb),
        Kind("byte_orientation.tif", tiff(rgb, orientation=struct.pack("<HHII", ORIENTATION, 1, 1, 6)), rgb),
        Kind("zero_orientation.tif", tiff(rgb, orientation=struct.pack("<HHII", ORIENTATION, 3, 1, 0)), rgb),
        Kind("big_endian.tif", tiff(six, orientation=struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0), big=True), rgb),
        Kind("gray.tif", tiff(flat), repeated(flat)),
        Kind("white_is_zero.tif", tiff(255 - flat, photometric=0), repeated(flat)),
        Kind("gray16.tif", tiff((flat.astype(np.uint16) << 8) | 9), repeated(flat)),
        Kind("gray16_big.tif", tiff((flat.astype(np.uint16) << 8) | 9, big=True), repeated(flat)),
        Kind("gray16_turned.tif", tiff(TURNS[6](flat.astype(np.uint16) << 8), orientation=struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)),
             repeated(flat)),
        Kind("rgb16.tif", tiff((rgb.astype(np.uint16) << 8) | 9), rgb),
        Kind("int32_small.tif", tiff(flat.astype(np.int32) << 8, sample_format=2), repeated(flat)),
        Kind("cmyk.tif", saved(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb),
        Kind("one_bit.tif", saved(Image.fromarray(flat).convert("1"), "TIFF"),
             repeated(np.asarray(Image.fromarray(flat).convert("1").convert("L")))),
        Kind("group4.tif", saved(Image.fromarray(flat).convert("1"), "TIFF", compression="group4"),
             repeated(np.asarray(Image.fromarray(flat).convert("1").convert("L")))),
        Kind("two_pages.tif", saved(rgb, "TIFF", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())]), rgb),
        Kind("float.tif", tiff(flat.astype(np.float32), sample_format=3), refused="floating-point"),
        Kind("int16_negative.tif", tiff(flat.astype(np.int16) - 300, sample_format=2), refused="negative"),
        Kind("int32_large.tif", tiff(flat.astype(np.int32) * 70000, sample_format=2), refused="16 bits"),
        Kind("lab.tif", saved(Image.merge("LAB", [Image.fromarray(flat), *[Image.new("L", (WIDTH, HEIGHT), 128)] * 2]), "TIFF"),
             repeated(_gray_of_lightness(flat)), near=1.0),
    ]
    return kinds


def _gray_of_lightness(lightness_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W] of sRGB whose CIE lightness is 100 / 255 of these numbers."""
    f = (lightness_HW / 255 * 100 + 16) / 116
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return np.round(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)


def _others() -> list[Kind]:
    rgb, flat = picture(), gray()
    six = TURNS[6](rgb)
    lossless = saved(rgb, "WEBP", lossless=True)
    palette = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    entries = np.concatenate([palette[:, ::-1], np.zeros((256, 1), np.uint8)], axis=1)
    indices = flat // 16
    five = (rgb >> 3).astype("<u2")
    packed555 = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]).astype("<u2")
    seen555 = (((rgb >> 3).astype(np.uint16) * 255) // 31).astype(np.uint8)
    kinds = [
        Kind("lossy.webp", saved(rgb, "WEBP", quality=95), rgb, near=6.0),
        Kind("lossless.webp", lossless, rgb),
        Kind("alpha.webp", saved(np.dstack([rgb, np.full_like(flat, 200)]), "WEBP", lossless=True, exact=True), rgb),
        Kind("exif.webp", saved(six, "WEBP", lossless=True, exif=exif_block(6)), rgb),
        Kind("exif_without_head.webp", riff(saved(rgb, "WEBP", lossless=True), webp_chunk(b"EXIF", exif_block(3, prefix=b"")), flags=8),
             rgb[::-1, ::-1]),
        Kind("odd_chunk.webp", riff(lossless, webp_chunk(b"EXIF", exif_block(3) + b"\0"), flags=8), rgb[::-1, ::-1]),
        Kind("bits24.bmp", bmp(rgb[..., ::-1].reshape(HEIGHT, -1), 24), rgb),
        Kind("top_down.bmp", bmp(rgb[..., ::-1].reshape(HEIGHT, -1), 24, top_down=True), rgb),
        Kind("bits32.bmp", bmp(np.dstack([rgb[..., ::-1], np.full_like(flat, 255)]).reshape(HEIGHT, -1), 32), rgb),
        Kind("bits16.bmp", bmp(packed555.view(np.uint8).reshape(HEIGHT, -1), 16), seen555),
        Kind("bits8.bmp", bmp(indices, 8, entries.tobytes()), palette[indices]),
        Kind("bits4.bmp", bmp((indices[:, ::2] << 4) | indices[:, 1::2], 4, entries[:16].tobytes()), palette[indices]),
        Kind("bits1.bmp", bmp(np.packbits(flat >> 7, axis=1), 1, entries[:2].tobytes()), palette[flat >> 7]),
        Kind("p6.ppm", b"P6\n%d %d\n255\n" % (WIDTH, HEIGHT) + rgb.tobytes(), rgb),
        Kind("p3.ppm", b"P3\n%d %d\n255\n" % (WIDTH, HEIGHT) + b" ".join(b"%d" % v for v in rgb.ravel().tolist()), rgb),
        Kind("p5.ppm", b"P5 # a comment\n%d %d\n255\n" % (WIDTH, HEIGHT) + flat.tobytes(), repeated(flat)),
        Kind("p2.ppm", b"P2\n%d %d\n255\n" % (WIDTH, HEIGHT) + b" ".join(b"%d" % v for v in flat.ravel().tolist()), repeated(flat)),
        Kind("p5.pgm", b"P5\n%d %d\n255\n" % (WIDTH, HEIGHT) + flat.tobytes(), repeated(flat)),
        Kind("p5_16.ppm", b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + (flat.astype(">u2") << 8 | 3).astype(">u2").tobytes(), repeated(flat)),
        Kind("p6_16.ppm", b"P6\n%d %d\n65535\n" % (WIDTH, HEIGHT) + (rgb.astype(np.uint16) * 257).astype(">u2").tobytes(), rgb),
        Kind("p4.ppm", b"P4\n%d %d\n" % (WIDTH, HEIGHT) + np.packbits(flat < 128, axis=1).tobytes(),
             repeated(np.where(flat < 128, 0, 255).astype(np.uint8))),
        Kind("png_called.jpg", png(rgb, 8, 2), rgb, plain=True),
        Kind("jpeg_called.png", jpeg(), rgb, near=4.0, plain=True),
    ]
    return kinds


FAMILIES: dict[str, Callable[[], list[Kind]]] = {"jpeg": _jpegs, "png": _pngs, "tiff": _tiffs, "others": _others}


def kinds() -> list[Kind]:
    """Every kind, in a fixed order."""
    return [kind for family in FAMILIES.values() for kind in family()]
