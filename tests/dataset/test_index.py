"""Data preparation: layouts, mask formats, the EXIF rule, refusals, staleness, damaged indices."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps

from stpp.dataset import check, index, layouts, survey, table
from stpp.errors import UserError
from stpp.images import masks
from stpp.images.image_file import opened, orientation, upright, upright_size

CLASSES = ("ground", "thing", "other")


def picture(path: Path, width: int = 12, height: int = 8, mode: str = "RGB", **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), 90 if mode in ("L", "P") else (90,) * len(mode)).save(path, **save)
    return path


def labels(path: Path, width: int = 12, height: int = 8, value: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), value).save(path)
    return path


def voc(root: Path, count: int = 3) -> Path:
    for i in range(count):
        picture(root / "JPEGImages" / f"{i}.jpg", 12 + i)
        labels(root / "SegmentationClass" / f"{i}.png", 12 + i)
    return root


def turned(orientation: int) -> dict:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def tree(root: Path) -> str:
    """Returns names, contents and times below a folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def prepare(root: Path, out: Path, **options) -> index.Index:
    return index.prepare(root, out, progress=False, **{"classes": CLASSES, **options})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values: np.ndarray, bits: int, kind: int, *, extra: bytes = b"") -> bytes:
    """Builds a PNG by hand: [H, W] or [H, W, channels] numbers of `bits` bits, colour type `kind`."""
    height, width = values.shape[:2]
    flat = values.reshape(height, -1)
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in flat]
    elif bits == 8:
        rows = [row.astype(np.uint8).tobytes() for row in flat]
    else:
        shifts = np.arange(bits - 1, -1, -1)
        rows = [np.packbits(((row[:, None] >> shifts) & 1).astype(np.uint8)).tobytes() for row in flat]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    palette = (
        chunk(b"PLTE", bytes(np.random.default_rng(0).integers(0, 256, 3 << bits, dtype=np.uint8)))
        if kind == 3
        else b""
    )
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + palette + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- masks


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind_bits=st.sampled_from(
        [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (3, 1), (3, 2), (3, 4), (3, 8), (2, 8), (4, 8), (6, 8)]
    ),
    data=st.data(),
)
def test_any_png_gives_its_values(tmp_path, kind_bits, data):
    kind, bits = kind_bits
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 19)))
    values = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, min(255, (1 << bits) - 1))))
    stored = values
    if kind in (2, 4, 6):
        alpha = np.arange(values.size, dtype=np.uint8).reshape(shape)
        stored = np.stack([values] * (1 if kind == 4 else 3) + [alpha] * (kind != 2), axis=-1)
    path = tmp_path / "mask.png"
    path.write_bytes(png(stored, bits, kind))
    found = masks.read_mask(path)
    read, plain = found.values, found.plain
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, values)
    assert plain == (kind_bits == (0, 8))


@settings(max_examples=30, deadline=None)
@given(mask=arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))), fast=st.booleans())
def test_written_masks_read_back(mask, fast):
    file = io.BytesIO()
    masks.write_index_png(file, mask, fast=fast)
    image = Image.open(file)
    assert image.mode == "L" and file.getvalue()[24:26] == b"\x08\x00"
    np.testing.assert_array_equal(np.asarray(image), mask)
    np.testing.assert_array_equal(masks.count_indices(mask), np.bincount(mask.ravel(), minlength=256))


@pytest.mark.parametrize("bad", [np.zeros((2, 2)), np.zeros((2, 2, 1), np.uint8), np.zeros((0, 2), np.uint8),
                                 [[1]]])
def test_only_index_masks_are_written(bad):
    with pytest.raises(ValueError, match="uint8"):
        masks.write_index_png(io.BytesIO(), bad)


def test_grayscale_with_transparency_is_not_plain(tmp_path):
    values = np.array([[0, 1, 2]], dtype=np.uint8)
    path = tmp_path / "mask.png"
    path.write_bytes(png(values, 8, 0, extra=chunk(b"tRNS", b"\0\1")))
    found = masks.read_mask(path)
    read, plain = found.values, found.plain
    np.testing.assert_array_equal(read, values)
    assert not plain


@pytest.mark.parametrize("tail", [b"", b"IEND", chunk(b"IEND", b"") + b"trailing"])
def test_masks_without_a_proper_end_are_not_plain(tmp_path, tail):
    path = tmp_path / "mask.png"
    path.write_bytes(png(np.array([[0, 1, 2]]), 8, 0)[:-12] + tail)
    found = masks.read_mask(path)
    read, plain = found.values, found.plain
    np.testing.assert_array_equal(read, [[0, 1, 2]])
    assert not plain


def _bad_masks() -> dict[str, tuple[bytes, str]]:
    good = png(np.ones((8, 12), np.uint8), 8, 0)
    jpeg = io.BytesIO()
    Image.new("L", (12, 8)).save(jpeg, "JPEG")
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    wide = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 8, 0, 0, 0, 0))
    return {
        "empty": (b"", "0 bytes"),
        "text": (b"not an image at all, " * 9, "not a PNG"),
        "jpeg": (jpeg.getvalue(), "JPEG"),
        "short": (good[:20], "truncated"),
        "truncated": (good[:-24], "cannot be read"),
        "bad crc": (good[:40] + b"\xff" + good[41:], "cannot be read"),
        "bomb": (bomb + chunk(b"IDAT", zlib.compress(b"")), "cannot be read|pixels exceed"),
        "wide": (wide + chunk(b"IDAT", zlib.compress(b"")), "pixels exceed"),
        "colours": (png(np.arange(288).reshape(8, 12, 3) % 256, 8, 2),
                    r"colours \(first \(0, 1, 2\) at x 0, y 0\)"),
        "ids above 255": (png(np.full((8, 12), 300), 16, 0), r"300 \(96 pixels\)"),
        "16 bits of colour": (png(np.ones((8, 12, 3), int), 16, 2), "16-bit"),
        "16 bits and alpha": (png(np.ones((8, 12, 2), int), 16, 4), "16-bit"),
    }


@pytest.mark.parametrize("what", _bad_masks())
def test_bad_masks_are_refused_with_their_name(tmp_path, what):
    content, said = _bad_masks()[what]
    path = tmp_path / "bad one.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        masks.read_index_mask(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 200))
def test_damaged_masks_raise_only_user_errors(tmp_path, place, byte, cut):
    content = bytearray(png(np.arange(96).reshape(8, 12) % 3, 4, 3))
    content[place % len(content)] = byte
    path = tmp_path / "mask.png"
    path.write_bytes(bytes(content[:cut]))
    try:
        assert masks.read_index_mask(path).dtype == np.uint8
    except UserError as error:
        assert str(path) in str(error)


# --- EXIF


@pytest.mark.parametrize("value", range(1, 9))
def test_upright_equals_pillow_transposition(value):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG", **turned(value))
    expected = ImageOps.exif_transpose(Image.open(file))
    np.testing.assert_array_equal(upright(pixels, value), np.asarray(expected))
    assert upright_size(6, 4, value) == expected.size


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_orientation_is_read_from_every_format(tmp_path, extension):
    path = picture(tmp_path / f"a.{extension}", **turned(6))
    with opened(path) as image:
        assert orientation(image) == 6


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"junk" * 50])
def test_damaged_exif_is_upright(tmp_path, block):
    path = picture(tmp_path / "a.jpg", exif=block)
    with opened(path) as image:
        assert orientation(image) == 1


def test_images_and_masks_follow_one_exif_rule(tmp_path):
    root = tmp_path / "data"
    picture(root / "JPEGImages" / "a.jpg", 12, 8, **turned(6))
    labels(root / "SegmentationClass" / "a.png", 8, 12)
    made = prepare(root, tmp_path / "upright")
    assert (made.entries["JPEGImages/a.jpg"].width, made.entries["JPEGImages/a.jpg"].height) == (8, 12)
    with pytest.raises(UserError,
                       match=r"a\.png: the mask has 8x12 .* 12x8; they match with --data\.exif, "):
        prepare(root, tmp_path / "stored", exif=False)

    labels(root / "SegmentationClass" / "a.png", 12, 8)
    with pytest.raises(UserError, match=r"they match with --data\.no-exif.* 6"):
        prepare(root, tmp_path / "upright")
    entry = prepare(root, tmp_path / "stored", exif=False).entries["JPEGImages/a.jpg"]
    assert (entry.width, entry.height, entry.converted) == (12, 8, None)


def test_mask_with_its_own_orientation_is_turned(tmp_path):
    root = tmp_path / "data"
    picture(root / "JPEGImages" / "a.jpg", 12, 8, **turned(6))
    stored = np.arange(96, dtype=np.uint8).reshape(8, 12) % 3
    (root / "SegmentationClass").mkdir()
    Image.fromarray(stored).save(root / "SegmentationClass" / "a.png", **turned(6))
    made = prepare(root, tmp_path / "index")
    mask = Image.open(made.sample("JPEGImages/a.jpg").mask)
    np.testing.assert_array_equal(np.asarray(mask), np.rot90(stored, -1))
    assert orientation(mask) == 1
    as_stored = prepare(root, tmp_path / "stored", exif=False)
    mask = Image.open(as_stored.sample("JPEGImages/a.jpg").mask)
    np.testing.assert_array_equal(np.asarray(mask), stored)
    # Rewritten without the orientation: no decoder can turn it.
    assert orientation(mask) == 1


# --- layouts


def test_voc_pairs_by_name_and_allows_unlabelled_images(tmp_path):
    root = voc(tmp_path)
    picture(root / "JPEGImages" / "unlabelled.JPEG")
    found = layouts.find(root)
    assert [(one.image, one.mask) for one in found[-2:]] == [
        ("JPEGImages/2.jpg", "SegmentationClass/2.png"),
        ("JPEGImages/unlabelled.JPEG", None),
    ]
    labels(root / "SegmentationClassAug" / "unlabelled.png")
    found = layouts.find(root, "voc", masks="SegmentationClassAug/*.png")
    assert [one.mask for one in found] == [None, None, None, "SegmentationClassAug/unlabelled.png"]


def test_camvid_and_globs_pair_below_their_folders(tmp_path):
    picture(tmp_path / "images" / "train" / "x" / "a.jpg")
    picture(tmp_path / "images" / "val" / "a.JPG")
    labels(tmp_path / "masks" / "val" / "a.PNG")
    labels(tmp_path / "masks" / "train" / "x" / "a.png")
    found = layouts.find(tmp_path, "camvid")
    assert [(one.key, one.mask) for one in found] == [
        ("images/train/x/a", "masks/train/x/a.png"),
        ("images/val/a", "masks/val/a.PNG"),
    ]
    assert layouts.find(tmp_path, "globs", "images/**/*.jpg", "masks/**/*.png") == found
    assert layouts.find(tmp_path, "auto", "images/**/*", "masks/**/*") == found
    assert [one.key for one in layouts.find(tmp_path, "globs", "images/*/*.jpg")] == ["images/val/a"]


def test_globs_pair_names_with_fixed_endings(tmp_path):
    picture(tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_1_leftImg8bit.png")
    labels(tmp_path / "gtFine" / "train" / "ulm" / "ulm_1_gtFine_labelTrainIds.png")
    labels(tmp_path / "gtFine" / "train" / "ulm" / "ulm_1_gtFine_color.png")
    (one,) = layouts.find(tmp_path, "globs", "leftImg8bit/**/*_leftImg8bit.png",
                          "gtFine/**/*_gtFine_labelTrainIds.png")
    assert one.mask == "gtFine/train/ulm/ulm_1_gtFine_labelTrainIds.png"


def test_names_with_spaces_accents_and_dots(tmp_path):
    root = tmp_path / "data"
    composed, decomposed = "caf\u00e9 au lait.v2", "cafe\u0301 au lait.v2"
    picture(root / "photos" / f"{composed}.JPG")
    labels(root / "labels" / f"{decomposed}.png")
    picture(root / "photos" / "._hidden.jpg")
    made = prepare(root, tmp_path / "index", images="photos/*.jpg", masks="labels/*.png")
    (entry,) = made.entries.values()
    assert (entry.key, entry.mask) == (f"photos/{composed}", f"labels/{decomposed}.png")
    assert made.find(f"photos/{decomposed}.JPG") == entry


@pytest.mark.parametrize(
    ("layout", "images", "found", "said"),
    [
        ("kitti", None, "", "unknown; allowed: auto, voc"),
        ("auto", None, "", "neither JPEGImages/ .* nor images/"),
        ("globs", None, "", "--data.images"),
        ("voc", "a/*.jpg", "", "needs --data.layout globs"),
        ("voc", None, "", "no image found; looked for JPEGImages"),
        ("globs", "a/*.png", "", "no image found; looked for a/"),
        ("globs", "../*.png", "", r"without '\.\.'"),
        ("globs", "/etc/*.png", "", "below the data root"),
        ("globs", "a/b.png", "", r"has no '\*'"),
    ],
)
def test_wrong_layouts_are_refused(tmp_path, layout, images, found, said):
    with pytest.raises(UserError, match=said):
        layouts.find(tmp_path, layout, images)


def test_missing_roots_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        layouts.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        layouts.find(picture(tmp_path / "a.jpg"))


def test_masks_that_fit_no_image_are_refused(tmp_path):
    root = voc(tmp_path)
    labels(root / "labels" / "elsewhere.png")
    with pytest.raises(UserError, match=r"no mask belongs to an image.*labels/elsewhere\.png"):
        layouts.find(root, "globs", "JPEGImages/*.jpg", "labels/*.png")
    with pytest.raises(UserError, match="--data.masks nothing"):
        layouts.find(root, "globs", "JPEGImages/*.jpg", "nothing/*.png")


def test_unpaired_masks_are_reported(tmp_path, capsys):
    root = voc(tmp_path)
    assert len(layouts.find(root)) == 3 and capsys.readouterr().err == ""
    labels(root / "SegmentationClass" / "other.png")
    (root / "JPEGImages" / "1.jpg").unlink()
    assert [one.mask for one in layouts.find(root)] == ["SegmentationClass/0.png", "SegmentationClass/2.png"]
    assert "masks that belong to no image: 2, for example SegmentationClass/1.png" in capsys.readouterr().err


def test_duplicate_keys_name_both_files(tmp_path):
    root = voc(tmp_path)
    picture(root / "JPEGImages" / "1.png")
    with pytest.raises(UserError, match=r"duplicate key.*JPEGImages/1\.jpg and JPEGImages/1\.png"):
        layouts.find(root)
    (root / "JPEGImages" / "1.png").unlink()
    labels(root / "SegmentationClass" / "1.PNG")
    with pytest.raises(UserError,
                       match=r"duplicate key.*SegmentationClass/1\.PNG and SegmentationClass/1\.png"):
        layouts.find(root)


def test_links_must_not_leave_the_root(tmp_path):
    root = voc(tmp_path / "data")
    outside = picture(tmp_path / "outside" / "secret.jpg")
    link = root / "JPEGImages" / "link.jpg"
    link.symlink_to(outside)
    with pytest.raises(UserError, match="link.jpg: is a link to .*outside"):
        layouts.find(root)
    link.unlink()
    (root / "JPEGImages" / "folder").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="folder: is a link to .*outside"):
        layouts.find(root)
    (root / "JPEGImages" / "folder").unlink()
    (root / "JPEGImages" / "circle").symlink_to(root / "JPEGImages")
    link.symlink_to(root / "JPEGImages" / "0.jpg")
    assert [one.image for one in layouts.find(root)][-1] == "JPEGImages/link.jpg"


@pytest.mark.parametrize("name", ["line\nbreak.jpg", "bell\x07.jpg", os.fsdecode(b"latin\xe9.jpg")])
def test_names_that_lists_cannot_hold_are_refused(tmp_path, name):
    root = voc(tmp_path)
    try:
        picture(root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / name)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(UserError, match="rename it") as error:
        layouts.find(root)
    assert "\n" not in str(error.value)


# --- prepare, load


def test_prepare_converts_masks_and_keeps_the_data_unchanged(tmp_path):
    root, out = voc(tmp_path / "data"), tmp_path / "index"
    paletted = Image.new("P", (12, 8), 2)
    paletted.putpalette([200, 0, 0] * 256)
    paletted.save(root / "SegmentationClass" / "0.png")
    (root / "SegmentationClass" / "1.png").write_bytes(png(np.full((8, 13), 1), 16, 0))
    picture(root / "JPEGImages" / "sub folder" / "unlabelled.JPG", 30, 20, "CMYK")
    before = tree(root)
    made = prepare(root, out)
    assert tree(root) == before
    assert made.counts == {"images": 4, "masks": 3, "converted": 2}
    assert (made.layout, made.classes, made.exif, made.root) == ("voc", CLASSES, True, root)
    first = made.sample("JPEGImages/0.jpg", strong=True)
    assert (first.key, first.width, first.height, first.strong) == ("JPEGImages/0", 12, 8, True)
    assert first.mask == str(out / "masks" / "JPEGImages" / "0.png")
    mask = Image.open(first.mask)
    assert mask.mode == "L" and mask.getcolors() == [(96, 2)]
    assert made.entries["JPEGImages/1.jpg"].class_pixels == [0, 104, 0]
    assert made.sample("JPEGImages/2.jpg").mask == str(root / "SegmentationClass" / "2.png")
    last = made.entries["JPEGImages/sub folder/unlabelled.JPG"]
    assert (last.width, last.height, last.mask, last.converted,
            last.class_pixels) == (30, 20, None, None, None)
    assert last.bytes == (root / last.image).stat().st_size
    assert made.sample("JPEGImages/0.jpg", mask=None).mask is None
    assert made.sample("JPEGImages/0.jpg",
                       mask=str(tmp_path / "pseudo.png")).mask == str(tmp_path / "pseudo.png")
    with pytest.raises(UserError, match=r"JPEGImages/9\.jpg"):
        made.sample("JPEGImages/9.jpg")
    again = index.load(out)
    assert again.fingerprint == made.fingerprint and dict(again.entries) == dict(made.entries)


def test_all_problems_are_reported(tmp_path, capsys):
    root, out = voc(tmp_path / "data", 30), tmp_path / "index"
    for i in range(25):
        labels(root / "SegmentationClass" / f"{i}.png", 12 + i, value=7)
    labels(root / "SegmentationClass" / "26.png", 5, 5)
    content = (root / "JPEGImages" / "27.jpg").read_bytes()
    (root / "JPEGImages" / "27.jpg").write_bytes(content[: len(content) - 30])
    (root / "JPEGImages" / "28.jpg").write_bytes(b"")
    (root / "SegmentationClass" / "29.png").write_bytes(b"text")
    with pytest.raises(UserError, match="29 problems") as error:
        prepare(root, out)
    assert "\n" not in str(error.value) and str(out / "problems.txt") in str(error.value)
    listed = (out / "problems.txt").read_text().splitlines()
    assert len(listed) == 29 and not (out / "index.json").exists() and not (out / "index.parquet").exists()
    assert len(capsys.readouterr().err.splitlines()) == survey.SHOWN_PROBLEMS
    text = "\n".join(listed)
    assert "SegmentationClass/3.png: class id 7 in 120 pixels; the class list has ids 0 to 2" in text
    assert (
        "SegmentationClass/26.png: the mask has 5x5 pixels, but its image JPEGImages/26.jpg has 38x8" in text
    )
    for name in ("JPEGImages/27.jpg", "JPEGImages/28.jpg", "SegmentationClass/29.png"):
        assert f"{name}: " in text
    assert str(root) not in text
    with pytest.raises(UserError, match="its preparation is unfinished; run"):
        index.load(out)


def test_255_is_ignored_and_not_counted(tmp_path, capsys):
    root = voc(tmp_path / "data", 1)
    labels(root / "SegmentationClass" / "0.png", value=255)
    assert prepare(root, tmp_path / "index").entries["JPEGImages/0.jpg"].class_pixels == [0, 0, 0]
    assert "ground, thing, other" in capsys.readouterr().err


def test_class_lists(tmp_path):
    root = voc(tmp_path / "data")
    assert index.prepare(root, tmp_path / "a", progress=False).classes[20] == "tvmonitor"
    (root / "classes.json").write_text('["a", "b"]')
    assert index.prepare(root, tmp_path / "a", progress=False).classes == ("a", "b")
    (root / "classes.json").write_text('{"classes": ["c", "d"]}')
    assert index.prepare(root, tmp_path / "a", progress=False).classes == ("c", "d")
    assert prepare(root, tmp_path / "a").classes == CLASSES
    for bad in ("[", '{"names": []}', '["a", 1]', '["a", "a"]', '["a"]', "[" * 100000,
                json.dumps(list("x" * 999))):
        (root / "classes.json").write_text(bad)
        with pytest.raises(UserError, match=r"classes\.json"):
            index.prepare(root, tmp_path / "a", progress=False)
    (root / "classes.json").unlink()
    (root / "JPEGImages").rename(root / "images")
    with pytest.raises(UserError, match="--data.classes"):
        index.prepare(root, tmp_path / "a", progress=False)


@pytest.mark.parametrize("where", [".", "JPEGImages", "JPEGImages/index", "SegmentationClass"])
def test_index_among_the_data_is_refused(tmp_path, where):
    root = voc(tmp_path)
    before = tree(root)
    with pytest.raises(UserError, match="among the images or masks"):
        prepare(root, root / where)
    assert tree(root) == before


def test_foreign_masks_folder_is_not_overwritten(tmp_path):
    root = voc(tmp_path / "data")
    theirs = labels(tmp_path / "theirs" / "masks" / "JPEGImages" / "0.png", value=2)
    with pytest.raises(UserError, match="not an index's"):
        prepare(root, tmp_path / "theirs")
    assert Image.open(theirs).getpixel((0, 0)) == 2


def test_an_index_below_the_root_is_not_data(tmp_path):
    for i in range(2):
        Image.new("P", (12, 8), i).save(picture(tmp_path / f"{i}.png"))
        picture(tmp_path / f"{i}.jpg")
    options = {"images": "**/*.jpg", "masks": "**/*.png"}
    prepare(tmp_path, tmp_path / "runs" / "index", **options)
    assert not index.is_stale(tmp_path / "runs" / "index", tmp_path, classes=CLASSES, **options)
    assert prepare(tmp_path, tmp_path / "runs" / "index", **options).counts["converted"] == 2


def test_index_is_stale_when_files_or_settings_change(tmp_path):
    root, out = voc(tmp_path / "data"), tmp_path / "index"
    assert index.is_stale(out, root, classes=CLASSES)
    prepare(root, out)
    assert not index.is_stale(out, root, classes=CLASSES)
    assert not index.is_stale(out, str(root) + "/../data", classes=list(CLASSES), layout="voc")
    assert index.is_stale(out, root, classes=("a", "b", "c"))
    assert index.is_stale(out, root, classes=CLASSES, exif=False)
    assert index.is_stale(out, root, classes=CLASSES, images="JPEGImages/*.jpg",
                          masks="SegmentationClass/*.png")
    os.utime(root / "SegmentationClass" / "1.png", ns=(1, 1))
    assert index.is_stale(out, root, classes=CLASSES)
    prepare(root, out)
    picture(root / "JPEGImages" / "new.jpg")
    assert index.is_stale(out, root, classes=CLASSES)
    prepare(root, out)
    (root / "SegmentationClass" / "0.png").unlink()
    assert index.is_stale(out, root, classes=CLASSES)
    prepare(root, out)
    (out / "index.parquet").unlink()
    assert index.is_stale(out, root, classes=CLASSES)


def test_processes_that_share_a_folder_prepare_it_once(tmp_path, monkeypatch):
    root, checked = voc(tmp_path / "data"), []

    def check_files(*arguments, **options):
        checked.append(time.sleep(0.2))
        return original(*arguments, **options)

    original = survey.check_files
    monkeypatch.setattr(survey, "check_files", check_files)
    with ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(lambda _: index.prepare(
            root, tmp_path / "index", progress=False, only_if_stale=True, classes=CLASSES), range(4)))
    assert len(checked) == 1
    assert {(entry.contents, tuple(entry.entries)) for entry in prepared} == {
        (prepared[0].contents, tuple(prepared[0].entries))}


def test_contents_equal_those_of_a_copy_and_change_with_one_pixel(tmp_path):
    first = index.prepare(voc(tmp_path / "data"), tmp_path / "index", progress=False, classes=CLASSES)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    second = index.prepare(tmp_path / "copy", tmp_path / "second", progress=False, classes=CLASSES)
    assert (second.contents, second.fingerprint == first.fingerprint) == (first.contents, False)
    mask = next((tmp_path / "copy" / "SegmentationClass").iterdir())
    pixels = masks.read_index_mask(mask).copy()
    pixels[0, 0] = 0 if pixels[0, 0] else 1
    masks.write_index_png(mask, pixels)
    third = index.prepare(tmp_path / "copy", tmp_path / "second", progress=False, classes=CLASSES)
    assert third.contents != first.contents


def test_damaged_and_foreign_indices_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root, out = voc(tmp_path / "data"), tmp_path / "index"
    prepare(root, out)
    good_json, good_parquet = (out / "index.json").read_text(), (out / "index.parquet").read_bytes()

    def parts(**changes) -> bytes:
        columns = pq.read_table(io.BytesIO(good_parquet))
        for name, values in changes.items():
            place = columns.schema.get_field_index(name)
            field = columns.schema.field(name)
            columns = columns.set_column(place, field, pa.array(values, field.type))
        file = io.BytesIO()
        pq.write_table(columns, file)
        return file.getvalue()

    for bad in ("", "{", "[]", "null", "[" * 100000, '{"format": "other"}',
                json.dumps({"format": "stpp-index", "version": table.VERSION}),
                good_json.replace('"images": 3', '"images": "3"'),
                good_json.replace('"exif": true', '"exif": 1'), good_json.replace(str(root), "somewhere"),
                "\udcff"):  # fmt: skip
        (out / "index.json").write_bytes(bad.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"index\.json.*(not an index|cannot be read)"):
            index.load(out)
        with pytest.raises(UserError, match=r"index\.json"):
            prepare(root, out)
    (out / "index.json").write_text(good_json.replace(f'"version": {table.VERSION}', '"version": 99'))
    with pytest.raises(UserError, match="version 99"):
        index.load(out)
    assert index.is_stale(out, root, classes=CLASSES)
    (out / "index.json").write_text(good_json)

    images = [f"JPEGImages/{i}.jpg" for i in range(3)]
    other = io.BytesIO()
    pq.write_table(pa.table({"image": images}), other)
    for bad in (b"", b"PAR1", good_parquet[: len(good_parquet) // 2], good_parquet[:-1], other.getvalue(),
                parts(image=["../secret.jpg", *images[1:]]), parts(image=["/etc/passwd", *images[1:]]),
                parts(converted=["masks/../../x.png", None, None]), parts(mask=["a/..", None, None]),
                parts(image=[images[0]] * 3), parts(width=[0, 1, 1]), parts(mask=[None] * 3),
                parts(class_pixels=[[1, 2]] * 3)):  # fmt: skip
        (out / "index.parquet").write_bytes(bad)
        with pytest.raises(UserError, match=r"index\.parquet: the index is damaged"):
            index.load(out)
    (out / "index.parquet").unlink()
    with pytest.raises(UserError, match="missing"):
        index.load(out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_flipped_bytes_in_the_table_raise_only_user_errors(tmp_path, place, byte):
    out = tmp_path / "index"
    if not (tmp_path / "good").exists():
        prepare(voc(tmp_path / "data"), out)
        (tmp_path / "good").write_bytes((out / "index.parquet").read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    content[place % len(content)] = byte
    (out / "index.parquet").write_bytes(bytes(content))
    try:
        list(index.load(out).entries.values())
    except UserError as error:
        assert "index.parquet" in str(error)


def test_several_processes_give_the_same_index(tmp_path):
    root = voc(tmp_path / "data", 150)
    labels(root / "SegmentationClass" / "99.png", 5, 5)
    found = layouts.find(root)
    tasks = [check.Task(one.key, one.image, one.mask, 0, 0) for one in found]
    arguments = (str(root), str(tmp_path / "index"), 3, True)
    alone = [one for chunk in check.check_all(tasks, arguments, 1) for one in chunk]
    together = [one for chunk in check.check_all(tasks, arguments, 2) for one in chunk]
    assert alone == together and [one.task for one in together] == tasks
    assert sum(map(len, [one.problems for one in together])) == 1


def test_worker_processes_load_neither_torch_nor_pyarrow():
    code = "import sys; import stpp.dataset.check; print(sorted({'torch', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          check=True)
    assert done.stdout.strip() == "[]"


def test_unwritable_index_folder_is_named(tmp_path):
    root = voc(tmp_path / "data")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(root, tmp_path / "file" / "index")


def test_camvid(tmp_path, camvid):
    made = index.prepare(camvid, tmp_path / "index", progress=False)
    assert made.counts == {"images": 468, "masks": 468, "converted": 0} and len(made.classes) == 11
    entry = made.entries["images/val/0016E5_07959.jpg"]
    mask = np.asarray(Image.open(made.sample(entry.image).mask))
    assert entry.class_pixels == [int((mask == i).sum()) for i in range(11)]
    assert not index.is_stale(tmp_path / "index", camvid)


def test_orientation_of_only_the_mask_is_named(tmp_path):
    picture(tmp_path / "data" / "photos" / "a.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "data" / "labels").mkdir()
    Image.new("L", (12, 8), 1).save(tmp_path / "data" / "labels" / "a.png", exif=exif)
    with pytest.raises(UserError,
                       match=r"--data.no-exif, as the mask's EXIF orientation is 6"):
        index.prepare(tmp_path / "data", tmp_path / "i", images="photos/*", masks="labels/*.png",
                      classes=CLASSES)
