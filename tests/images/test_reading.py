"""Decision how a file is read: from its beginning, with hostile bytes; and the reports of `prepare`."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import zoo_files as zoo
from stpp.dataset import index
from stpp.images import containers, planning
from stpp.images.image_file import upright
from stpp.images.pixels import BadImage, decode, normalised
from stpp.images.planning import BatchLimits
from stpp.images.reading import check_decodable, read_header, upright_pixels, used_bits, uses_few
from stpp.images.sources import Item

CUT = BatchLimits(max_batch=1, batch_pixels=1, max_pixels=1 << 24, exif=True)
EXIF_CHUNK = zoo.chunk(b"eXIf", zoo.exif_block(6, prefix=b""))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "behind",
    [b"", zoo.chunk(b"tEXt", b"Comment\0" + b"eXIf" * 400), zoo.chunk(b"tEXt", b"Comment\0" + b"x" * 60_000)],
)
def test_orientation_behind_the_pixels_of_a_long_png_is_found(tmp_path, behind):
    """More than the beginning is read; where another chunk's text contains the name, the checksum decides."""
    data = zoo.png(noise(90, 120), 8, 2, after=EXIF_CHUNK + behind)
    assert len(data) > planning.HEAD_BYTES
    (tmp_path / "a.png").write_bytes(b"before" + data + b"behind")
    inside = Item(key="a", source="a", file=str(tmp_path / "a.png"), offset=6, bytes=len(data))
    (tmp_path / "b.png").write_bytes(data)
    alone = Item(key="b", source="b", file=str(tmp_path / "b.png"))
    for item in (inside, alone):
        found = planning.examine(item, CUT)
        assert found.reading == read_header(data, exif=True) and (found.reading.orientation, found.size) == (
            6,
            (120, 90),
        )
        assert planning.examine(item, BatchLimits(**{**CUT.__dict__, "exif": False})).size == (90, 120)


def test_pixels_that_look_like_a_chunk_are_no_orientation():
    false = b"\0\0\0\x1aeXIf" + zoo.exif_block(6, prefix=b"") + b"\0\0\0\0"
    assert containers.png_exif(b"", b"pixels" + false) is None
    assert containers.png_exif(b"", b"pixels" + false + EXIF_CHUNK) == zoo.exif_block(6, prefix=b"")
    assert containers.png_exif(b"", false[4:]) is None


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", containers.PNG_SIGNATURE, b"\xff\xd8", b"\xff\xd8\xff\xe0", b"II*\0"]),
)
def test_hostile_bytes_give_no_image(data, start):
    found = start + data
    containers.png_header(found), containers.jpeg_frame(found), containers.png_exif(found, found)
    list(containers.png_chunks(found))
    with pytest.raises(BadImage) as caught:
        read_header(found, exif=True)
        decode(found)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), form=st.sampled_from(["jpeg", "png"]))
def test_changed_byte_never_ends_the_program(place, byte, form):
    data = bytearray(
        zoo.jpeg(exif=zoo.exif_block(6)) if form == "jpeg" else zoo.png(zoo.picture(), 8, 2, after=EXIF_CHUNK)
    )
    data[place % len(data)] = byte
    try:
        reading = read_header(bytes(data), exif=True)
        pixels = upright_pixels(bytes(data), reading)
    except BadImage as bad:
        assert "\n" not in str(bad)
    else:
        assert pixels.shape == (*reading.size, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("value", range(1, 9))
def test_arrays_and_tensors_are_turned_and_normalised_alike(value):
    import torch

    pixels = noise(5, 7)
    tensor = torch.from_numpy(pixels)
    assert np.array_equal(upright(tensor, value).numpy(), upright(pixels, value))
    assert np.array_equal(normalised(tensor).numpy(), normalised(pixels))
    assert np.array_equal(upright(np.ascontiguousarray(zoo.TURNS[value](pixels)), value), pixels)


def test_number_of_used_bits():
    for top, bits in ((4095, 12), (16383, 14), (16384, 15), (65535, 16), (200, 8)):
        values = np.full((3, 4), top, np.uint16)
        data = zoo.png(values, 16, 0)
        reading = read_header(data, exif=True)
        assert reading.bits == 16 and used_bits(decode(data), reading) == bits
        assert uses_few(bits, reading) == (bits <= 14)


@pytest.mark.parametrize("kind", ["int32.tif", "uint32.tif"])
def test_32_bit_images_that_use_few_bits_are_named(kind):
    """8-bit numbers in 32 bits would be black, because only the upper 8 of 16 bits are used."""
    values = zoo.gray().astype(np.int32)
    for factor, dark in ((1, True), (16, True), (257, False)):
        data = zoo.tiff(values * factor, sample_format=2 if kind.startswith("int") else 1)
        reading = read_header(data, exif=True)
        assert reading.bits == 32 and uses_few(check_decodable(data)[1].used_bits, reading) == dark


def test_twelve_bits_are_read_by_their_range():
    values = (zoo.gray().astype(np.uint16) << 4) | 9
    even, odd = values[:, ::2], values[:, 1::2]
    packed = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=2).astype(np.uint8)
    tags = [(256, zoo.WIDTH), (257, zoo.HEIGHT), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, zoo.HEIGHT), (279, packed.size)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 8 + packed.size) + packed.tobytes()
    data += struct.pack("<H", len(tags)) + entries + bytes(4)
    reading = read_header(data, exif=True)
    assert reading.bits == 12 and np.array_equal(upright_pixels(data, reading), zoo.repeated(zoo.gray()))
    assert check_decodable(data)[1].used_bits == 12 and not uses_few(12, reading) and uses_few(10, reading)


def test_images_of_few_flat_colours_are_distinguished_from_photographs():
    flat = (np.indices((40, 40))[1] // 14).astype(np.uint8)
    for data in (zoo.png(flat, 8, 0), zoo.png(flat > 1, 1, 0), zoo.png(np.dstack([flat] * 3), 8, 2),
                 zoo.saved(Image.fromarray(flat * 80).convert("P"), "PNG"), zoo.saved(flat, "TIFF"),
                 zoo.saved(flat, "BMP")):
        assert check_decodable(data)[1].like_mask
    photograph = noise(40, 40)
    for data in (zoo.png(photograph, 8, 2), zoo.png(flat * 0, 8, 0), zoo.png(flat[:9, :20], 8, 0),
                 zoo.saved(flat, "JPEG")):
        assert not check_decodable(data)[1].like_mask


def said(capsys, folder: Path, files: dict[str, bytes]) -> str:
    """Returns the messages of `prepare` for these files and a few plain ones."""
    photos = folder / "data" / "photos"
    photos.mkdir(parents=True)
    (folder / "data" / "labels").mkdir()
    for name, data in {"plain.jpg": zoo.jpeg(), "other.png": zoo.png(zoo.picture(), 8, 2), **files}.items():
        (photos / name).write_bytes(data)
    Image.fromarray(np.zeros((zoo.HEIGHT, zoo.WIDTH), np.uint8)).save(
        folder / "data" / "labels" / "plain.png"
    )
    capsys.readouterr()
    index.prepare(
        folder / "data",
        folder / "index",
        layout="globs",
        images="photos/*",
        masks="labels/*.png",
        classes=("a", "b"),
        workers=1,
        progress=False,
    )
    found = capsys.readouterr()
    return found.out + found.err


def test_prepare_reports_unexpected_appearance(capsys, tmp_path):
    cmyk = zoo.saved(Image.fromarray(zoo.picture()).convert("CMYK"), "JPEG")
    twelve = zoo.png(zoo.gray().astype(np.uint16) * 16, 16, 0)
    words = said(
        capsys,
        tmp_path,
        {
            "a.jpg": cmyk,
            "b.jpg": cmyk,
            "c.jpg": zoo.without_segment(cmyk, 0xEE),
            "d.png": twelve,
            "e.png": zoo.png(zoo.gray().astype(np.uint16) * 257, 16, 0),
            "f.png": zoo.png(np.dstack([zoo.picture(), zoo.gray()]), 8, 6),
        },
    )
    assert "2 images are CMYK with Adobe's marker: inks are stored inverted" in words
    assert "1 image is CMYK without Adobe's marker: inks are stored as they are" in words
    assert "1 of the images of more than 8 bits use at most 12 bits (the first: photos/d.png)" in words
    assert "1 image is partly transparent" in words
    assert "6 of 8 images are of kinds that decoders read differently" in words


def test_masks_among_the_images_are_named_by_content(capsys, tmp_path):
    flat = (np.indices((zoo.HEIGHT, zoo.WIDTH))[1] // 20).astype(np.uint8)
    words = said(capsys, tmp_path,
                 {"plain (object).png": zoo.png(flat, 8, 0), "b.png": zoo.png(flat * 80, 8, 0)})
    assert (
        "warning: 2 images without a mask have at most 16 flat colours, as masks do (the first: photos/b.png)"
        in words
    )


def test_prepare_is_silent_about_plain_photographs(capsys, tmp_path):
    words = said(
        capsys, tmp_path, {"turned.jpg": zoo.jpeg(zoo.TURNS[6](zoo.picture()), exif=zoo.exif_block(6))}
    )
    assert [line for line in words.splitlines() if "holds a pixel of" not in line] == []


def test_tiff_with_an_odd_tag_type_is_turned_once():
    """Pillow turns it by the same rule, whatever the type: the pixels are those of the plain file."""
    for entry, turn in (
        (struct.pack("<HHII", zoo.ORIENTATION, 4, 1, 3), 3),
        (struct.pack("<HHIBBBB", zoo.ORIENTATION, 1, 1, 3, 0, 0, 0), 1),
        (struct.pack("<HHIHH", zoo.ORIENTATION, 3, 2, 3, 3), 3),
        (struct.pack("<HHIHH", zoo.ORIENTATION, 3, 1, 12, 0), 1),
    ):
        data = zoo.tiff(zoo.TURNS[turn](zoo.picture()), orientation=entry)
        reading = read_header(data, exif=True)
        assert reading.orientation == turn
        assert np.array_equal(upright_pixels(data, reading), zoo.picture())
        stored = upright_pixels(data, read_header(data, exif=False))
        assert np.array_equal(stored, zoo.TURNS[turn](zoo.picture()))
