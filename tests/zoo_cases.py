"""Image files of every common kind, made from one picture, with the pixels that each shows."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from zoo_files import (
    HEIGHT,
    ORIENTATION,
    TURNS,
    WIDTH,
    bmp,
    chunk,
    exif_block,
    gray,
    jpeg,
    picture,
    png,
    repeated,
    riff,
    saved,
    scans,
    segment,
    tiff,
    webp_chunk,
    with_segments,
    without_segment,
    ycck,
)


@dataclass(frozen=True)
class Kind:
    """Kind of file."""

    name: str
    """Name with its extension."""
    data: bytes
    truth: np.ndarray | None = None
    """Pixels uint8 [H, W, 3] upright; None: refused."""
    near: float = 0.0
    """Mean tolerance to the truth, in grey levels: 0 for lossless kinds."""
    plain: bool = False
    """True if DALI decodes the file."""
    refused: str | None = None
    """Part of the reason of its refusal."""


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
        Kind("many_segments.jpg", with_segments(jpeg(), *[segment(0xE7, b"x" * 9000)] * 4), rgb, plain=True,
             **near),
    ]
    for name, sampling, far in (("s444_scans", (1, 1), 4.0), ("s420_scans", (2, 2), 9.0)):
        kinds.append(Kind(f"{name}.jpg", scans(sampling), rgb, plain=True, near=far))
    for name, sampling in (("s411", (4, 1)), ("s440", (1, 2)), ("s410", (4, 2))):
        kinds.append(Kind(f"{name}.jpg", scans(sampling), rgb, near=14.0))
    for turn in range(1, 9):
        kinds.append(Kind(f"turn{turn}.jpg", jpeg(TURNS[turn](rgb), exif=exif_block(turn)), rgb, plain=True,
                          **near))
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
        Kind("two_exif.jpg",
             with_segments(jpeg(six), segment(0xE1, exif_block(6)), segment(0xE1, exif_block(3))), rgb,
             plain=True, **near),
        Kind("xmp_then_exif.jpg",
             with_segments(jpeg(six), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
                                                segment(0xE1, exif_block(6))), rgb, plain=True, **near),
        Kind("xmp_orientation.jpg", with_segments(jpeg(), segment(
            0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')), rgb, plain=True, **near),
        Kind("exif_before_jfif.jpg", with_segments(jpeg(six), segment(0xE1, exif_block(6))), rgb, plain=True,
             **near),
        Kind("turned_gray.jpg", jpeg(TURNS[8](flat), exif=exif_block(8)), repeated(flat), plain=True, **near),
        Kind("turned_420.jpg", jpeg(six, subsampling=2, exif=exif_block(6)), rgb, plain=True, near=9.0),
    ]
    mpo = io.BytesIO()
    Image.fromarray(rgb).save(mpo, "MPO", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())],
                              quality=95, subsampling=0)
    kinds.append(Kind("two_pictures.jpg", mpo.getvalue(), rgb, **stored))
    cmyk = Image.fromarray(rgb).convert("CMYK")
    marked = jpeg(cmyk)
    kinds += [
        Kind("cmyk.jpg", marked, rgb, near=6.0),
        # Without the marker the numbers are plain inks: Pillow inverts when it writes, so this is
        # written inverted again.
        Kind("cmyk_unmarked.jpg",
             without_segment(jpeg(Image.fromarray(255 - np.asarray(cmyk), "CMYK")), 0xEE), rgb, near=6.0),
        Kind("cmyk_turned.jpg",
             jpeg(Image.fromarray(np.ascontiguousarray(TURNS[6](np.asarray(cmyk))), "CMYK"),
                  exif=exif_block(6)), rgb,
             near=6.0),
        Kind("ycck.jpg", ycck(np.asarray(cmyk)), rgb, near=6.0),
    ]
    return kinds


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
        Kind("colour_key.png", png(rgb, 8, 2, before=chunk(b"tRNS", struct.pack(">3H", *rgb[0, 0].tolist()))),
             rgb),
        Kind("gray_key.png", png(flat, 8, 0, before=chunk(b"tRNS", struct.pack(">H", int(flat[0, 0])))),
             repeated(flat)),
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
        Kind("exif_after_far.png", png(six, 8, 2, after=exif + chunk(b"tEXt", b"Comment\0" + b"x" * 3000)),
             rgb, plain=True),
        Kind("exif_gray_after.png",
             png(TURNS[3](flat), 8, 0, after=chunk(b"eXIf", exif_block(3, prefix=b""))), repeated(flat),
             plain=True),
        Kind("exif_palette_after.png",
             png(TURNS[8](indices), 8, 3, before=palette, after=chunk(b"eXIf", exif_block(8, prefix=b""))),
             table[indices]),
        Kind("gamma.png", png(rgb, 8, 2, before=chunk(b"gAMA", struct.pack(">I", 20000))), rgb, plain=True),
        Kind("icc.png", saved(rgb, "PNG", icc_profile=b"\0" * 200), rgb, plain=True),
        Kind("srgb.png",
             png(rgb, 8, 2, before=chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 45455))), rgb,
             plain=True),
        Kind("chromaticities.png",
             png(rgb, 8, 2, before=chunk(b"cHRM", struct.pack(">8I", *range(31000, 39000, 1000)))), rgb,
             plain=True),
        Kind("background.png", png(rgb, 8, 2, before=chunk(b"bKGD", struct.pack(">3H", 255, 0, 0))), rgb,
             plain=True),
        Kind("significant.png", png(rgb, 8, 2, before=chunk(b"sBIT", b"\5\5\5")), rgb, plain=True),
        Kind("text.png",
             png(rgb, 8, 2,
                 before=chunk(b"tEXt", b"Author\0me") + chunk(b"pHYs", struct.pack(">IIB", 2834, 2834, 1))),
             rgb,
             plain=True),
        Kind("raw_profile.png", png(rgb, 8, 2, before=chunk(
            b"tEXt", b"Raw profile type exif\0\nexif\n%8d\n%s\n" % (32, exif_block(6)[:32].hex().encode()))),
             rgb, plain=True),
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
    for turn, compression in zip(range(1, 9),
                                 ("raw", "tiff_lzw", "tiff_adobe_deflate", "lzma", "packbits", "tiff_lzw",
                                  "raw", "zstd"),
                                 strict=True):
        kinds.append(Kind(f"turn{turn}.tif",
                          saved(TURNS[turn](rgb), "TIFF", compression=compression,
                                tiffinfo={ORIENTATION: turn}), rgb))
    six = TURNS[6](rgb)
    kinds += [
        Kind("jpeg.tif", saved(six, "TIFF", compression="jpeg", quality=95, tiffinfo={ORIENTATION: 6}), rgb,
             near=9.0),
        Kind("long_orientation.tif", tiff(six, orientation=struct.pack("<HHII", ORIENTATION, 4, 1, 6)), rgb),
        Kind("byte_orientation.tif", tiff(rgb, orientation=struct.pack("<HHII", ORIENTATION, 1, 1, 6)), rgb),
        Kind("zero_orientation.tif", tiff(rgb, orientation=struct.pack("<HHII", ORIENTATION, 3, 1, 0)), rgb),
        Kind("big_endian.tif",
             tiff(six, orientation=struct.pack(">HHIHH", ORIENTATION, 3, 1, 6, 0), big=True), rgb),
        Kind("gray.tif", tiff(flat), repeated(flat)),
        Kind("white_is_zero.tif", tiff(255 - flat, photometric=0), repeated(flat)),
        Kind("gray16.tif", tiff((flat.astype(np.uint16) << 8) | 9), repeated(flat)),
        Kind("gray16_big.tif", tiff((flat.astype(np.uint16) << 8) | 9, big=True), repeated(flat)),
        Kind("gray16_turned.tif",
             tiff(TURNS[6](flat.astype(np.uint16) << 8),
                  orientation=struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)),
             repeated(flat)),
        Kind("rgb16.tif", tiff((rgb.astype(np.uint16) << 8) | 9), rgb),
        Kind("int32_small.tif", tiff(flat.astype(np.int32) << 8, sample_format=2), repeated(flat)),
        Kind("cmyk.tif", saved(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb),
        Kind("one_bit.tif", saved(Image.fromarray(flat).convert("1"), "TIFF"),
             repeated(np.asarray(Image.fromarray(flat).convert("1").convert("L")))),
        Kind("group4.tif", saved(Image.fromarray(flat).convert("1"), "TIFF", compression="group4"),
             repeated(np.asarray(Image.fromarray(flat).convert("1").convert("L")))),
        Kind("two_pages.tif",
             saved(rgb, "TIFF", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())]), rgb),
        Kind("float.tif", tiff(flat.astype(np.float32), sample_format=3), refused="floating-point"),
        Kind("int16_negative.tif", tiff(flat.astype(np.int16) - 300, sample_format=2), refused="negative"),
        Kind("int32_large.tif", tiff(flat.astype(np.int32) * 70000, sample_format=2), refused="16 bits"),
        Kind("lab.tif",
             saved(Image.merge("LAB", [Image.fromarray(flat), *[Image.new("L", (WIDTH, HEIGHT), 128)] * 2]),
                   "TIFF"),
             repeated(_gray_of_lightness(flat)), near=1.0),
    ]
    return kinds


def _gray_of_lightness(lightness_HW: np.ndarray) -> np.ndarray:
    """Returns uint8 [H, W] of sRGB whose CIE lightness is 100 / 255 of these numbers."""
    f = (lightness_HW / 255 * 100 + 16) / 116
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return np.round(255 * np.where(linear <= 0.0031308, 12.92 * linear,
                                   1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)


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
        Kind("alpha.webp",
             saved(np.dstack([rgb, np.full_like(flat, 200)]), "WEBP", lossless=True, exact=True), rgb),
        Kind("exif.webp", saved(six, "WEBP", lossless=True, exif=exif_block(6)), rgb),
        Kind("exif_without_head.webp",
             riff(saved(rgb, "WEBP", lossless=True), webp_chunk(b"EXIF", exif_block(3, prefix=b"")), flags=8),
             rgb[::-1, ::-1]),
        Kind("odd_chunk.webp", riff(lossless, webp_chunk(b"EXIF", exif_block(3) + b"\0"), flags=8),
             rgb[::-1, ::-1]),
        Kind("bits24.bmp", bmp(rgb[..., ::-1].reshape(HEIGHT, -1), 24), rgb),
        Kind("top_down.bmp", bmp(rgb[..., ::-1].reshape(HEIGHT, -1), 24, top_down=True), rgb),
        Kind("bits32.bmp", bmp(np.dstack([rgb[..., ::-1], np.full_like(flat, 255)]).reshape(HEIGHT, -1), 32),
             rgb),
        Kind("bits16.bmp", bmp(packed555.view(np.uint8).reshape(HEIGHT, -1), 16), seen555),
        Kind("bits8.bmp", bmp(indices, 8, entries.tobytes()), palette[indices]),
        Kind("bits4.bmp", bmp((indices[:, ::2] << 4) | indices[:, 1::2], 4, entries[:16].tobytes()),
             palette[indices]),
        Kind("bits1.bmp", bmp(np.packbits(flat >> 7, axis=1), 1, entries[:2].tobytes()), palette[flat >> 7]),
        Kind("p6.ppm", b"P6\n%d %d\n255\n" % (WIDTH, HEIGHT) + rgb.tobytes(), rgb),
        Kind("p3.ppm",
             b"P3\n%d %d\n255\n" % (WIDTH, HEIGHT) + b" ".join(b"%d" % v for v in rgb.ravel().tolist()), rgb),
        Kind("p5.ppm", b"P5 # a comment\n%d %d\n255\n" % (WIDTH, HEIGHT) + flat.tobytes(), repeated(flat)),
        Kind("p2.ppm",
             b"P2\n%d %d\n255\n" % (WIDTH, HEIGHT) + b" ".join(b"%d" % v for v in flat.ravel().tolist()),
             repeated(flat)),
        Kind("p5.pgm", b"P5\n%d %d\n255\n" % (WIDTH, HEIGHT) + flat.tobytes(), repeated(flat)),
        Kind("p5_16.ppm",
             b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + (flat.astype(">u2") << 8 | 3).astype(">u2").tobytes(),
             repeated(flat)),
        Kind("p6_16.ppm",
             b"P6\n%d %d\n65535\n" % (WIDTH, HEIGHT) + (rgb.astype(np.uint16) * 257).astype(">u2").tobytes(),
             rgb),
        Kind("p4.ppm", b"P4\n%d %d\n" % (WIDTH, HEIGHT) + np.packbits(flat < 128, axis=1).tobytes(),
             repeated(np.where(flat < 128, 0, 255).astype(np.uint8))),
        Kind("png_called.jpg", png(rgb, 8, 2), rgb, plain=True),
        Kind("jpeg_called.png", jpeg(), rgb, near=4.0, plain=True),
    ]
    return kinds


FAMILIES: dict[str, Callable[[], list[Kind]]] = {"jpeg": _jpegs, "png": _pngs, "tiff": _tiffs,
                                                 "others": _others}


def kinds() -> list[Kind]:
    """Lists every kind, in a fixed order."""
    return [kind for family in FAMILIES.values() for kind in family()]
