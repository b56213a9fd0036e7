"""Headers, batches and the stored plan."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import label_cases as cases
from stpp.images import pixels, planning
from stpp.images.pixels import BadImage
from stpp.images.planning import BatchLimits, Planned
from stpp.images.reading import Reading, read_header
from stpp.images.sources import Item, open_source
from stpp.label import plan
from stpp.label.plan import Plan

CUT = BatchLimits(max_batch=4, batch_pixels=10_000, max_pixels=1 << 20, exif=True)


def examined(size, error=None) -> Planned:
    found = None if error else Reading(size[1], size[0], 1, True)
    return Planned(item=Item(key="k", source="k", file="k"), position=-1, reading=found, batch=0, error=error)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([10, 50, 90, 200]), st.sampled_from([10, 60, 210]), st.booleans()),
                max_size=40),
       st.integers(1, 9))
def test_batches_hold_every_good_image_once(sizes, most):
    cut = BatchLimits(max_batch=most, batch_pixels=10_000, max_pixels=1 << 30, exif=True)
    planned = planning.cut_batches([examined(size[:2], "bad" if size[2] else None) for size in sizes], cut)
    assert sorted(one.position for one in planned) == list(range(len(sizes)))
    cut_again = list(planning.batches(planned))
    assert sorted(one.position for batch in cut_again
                  for one in batch) == [i for i, size in enumerate(sizes) if not size[2]]
    for batch in cut_again:
        (height, width), *others = {one.size for one in batch}
        assert not others and len(batch) <= most
        assert len(batch) == 1 or len(batch) * height * width <= 10_000
        assert all(sizes[one.position][:2] == one.size for one in batch)
    areas = [np.prod(batch[0].size) for batch in cut_again]
    assert areas == sorted(areas, reverse=True)


def test_plan_is_kept_when_files_change(tmp_path):
    source = cases.as_folder(tmp_path / "in", cases.good_files(7))
    made = plan.make(open_source(str(source)), tmp_path / "plan", shard_size=4)
    kept = Plan(folder=tmp_path / "plan", items=made["items"], shards=made["shards"], cut=CUT)
    with ThreadPoolExecutor(2) as pool:
        first = [kept.planned(shard, pool) for shard in range(2)]
        for path in source.rglob("*.jpg"):
            path.write_bytes(b"")
        assert [kept.planned(shard, pool) for shard in range(2)] == first
        assert [len(part) for part in first] == [4, 3]
        (tmp_path / "plan" / "part-000001.parquet").unlink()
        assert all(one.error == "the file is empty (0 bytes)" for one in kept.planned(1, pool))


def test_header_longer_than_the_first_read(tmp_path):
    picture = cases.picture(1)
    long = cases.encoded(picture, icc_profile=b"x" * 200_000)
    path = cases.as_folder(tmp_path, {"long.jpg": long}) / "long.jpg"
    with pytest.raises(BadImage):
        read_header(long[: planning.HEAD_BYTES], exif=True)
    found = planning.examine(Item(key="long", source="long", file=str(path)), CUT)
    assert found.error is None and found.size == (48, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = cases.encoded(cases.picture(1, (40, 56)), exif=exif)
    turned = read_header(data, exif=True)
    assert (turned.width, turned.height) == ((40, 56) if orientation >= 5 else (56, 40))
    assert turned.orientation == orientation
    assert read_header(data, exif=False)[:3] == (56, 40, 1)


def test_bad_headers_give_the_reason(tmp_path):
    cases.as_folder(tmp_path, cases.bad_files())
    found = {path.name: planning.examine(Item(key=path.name, source=path.name, file=str(path)), CUT).error
             for path in (tmp_path / "bad").iterdir()}
    assert found["empty.jpg"] == "the file is empty (0 bytes)"
    assert found["text.jpg"].startswith("not one of the formats JPEG, PNG")
    assert found["bomb.png"].startswith("it declares more than")
    assert found["huge.png"] == "20000x1000 pixels are more than --max-pixels 1048576"
    assert "cut_header.jpg" in found and found["cut_header.jpg"] is not None
    # their pixels will reveal it
    assert found["truncated.jpg"] is found["half.png"] is found["floats.tif"] is None
    absent = planning.examine(Item(key="x", source="x", file=str(tmp_path / "absent.jpg")), CUT)
    assert absent.error == "no such file" and absent.batch == -1


def test_images_that_all_decoders_read_alike():
    picture = cases.picture(3)
    deep = Image.fromarray(np.full((4, 5), 40000, np.uint16))
    for image, kind, plain in ((picture, "JPEG", True), (picture, "PNG", True),
                               (picture.convert("L"), "PNG", True), (picture.convert("L"), "JPEG", True),
                               (picture.convert("CMYK"), "JPEG", False), (picture.convert("P"), "PNG", False),
                               (picture.convert("RGBA"), "PNG", False), (deep, "PNG", False),
                               (picture, "BMP", False), (picture, "WEBP", False),
                               (picture.convert("1"), "PNG", False)):
        data = cases.encoded(image, kind)
        assert read_header(data, exif=True).plain is plain
    clear = cases.encoded(picture.convert("L"), "PNG", transparency=3)
    assert not read_header(clear, exif=True).plain


def test_deep_images_keep_their_upper_bits():
    deep = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert (pixels.decode(cases.encoded(Image.fromarray(deep), kind))[..., 1] == deep >> 8).all()
    assert (pixels.decode(cases.encoded(cases.picture(1), "PNG")) == np.asarray(cases.picture(1))).all()


@pytest.mark.parametrize("name", ["truncated.jpg", "half.png", "floats.tif", "empty.jpg", "text.jpg",
                                  "bomb.png", "cut_header.jpg"])
def test_bad_pixels_give_the_reason_in_one_line(name):
    with pytest.raises(BadImage) as bad:
        pixels.decode(cases.bad_files()[f"bad/{name}"])
    assert "\n" not in str(bad.value) and len(str(bad.value)) < 220
