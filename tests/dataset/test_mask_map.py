"""Mask maps: the grammar of their entries, masks of ids and of colours, and refusals that name the file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stpp.dataset import cityscapes, index, mask_map
from stpp.errors import UserError
from stpp.images import masks

CLASSES = ("road", "car", "sky")


def mapped(path: Path, *entries: str, classes=CLASSES) -> np.ndarray:
    return masks.read_mask(path, mask_map=mask_map.parse(entries, classes)).values


def saved(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


# --- ids


def test_ids_that_start_at_one(tmp_path):
    """As in ADE20K: 0 is ignore, classes are 1 to 150."""
    classes = [f"class {i}" for i in range(150)]
    path = saved(tmp_path / "mask.png", np.array([[0, 1, 150, 255]], dtype=np.uint8))
    found = mapped(path, "0=ignore", "1-150=0-149", classes=classes)
    assert found.dtype == np.uint8 and found.tolist() == [[255, 0, 149, 255]]


def test_ids_above_255(tmp_path):
    path = saved(tmp_path / "mask.png", np.array([[0, 24001, 26999]], dtype=np.uint16))
    assert mapped(path, "0=255", "24000-24999=car", "26000-26999=0").tolist() == [[255, 1, 0]]


def test_palette_masks_give_their_ids(tmp_path):
    image = Image.fromarray(np.array([[7, 8]], dtype=np.uint8)).convert("P")
    image.putdata([7, 8])
    image.putpalette([9, 9, 9] * 256)
    image.save(tmp_path / "mask.png")
    assert mapped(tmp_path / "mask.png", "7=2", "8=0").tolist() == [[2, 0]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.dictionaries(st.integers(0, 300), st.sampled_from([0, 1, 2, 255]), min_size=1, max_size=12),
       data=st.data())
def test_any_table_of_ids_is_applied(table, data):
    made = mask_map.parse([f"{stored}={target}" for stored, target in table.items()], CLASSES)
    values = np.array(data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=20)),
                      dtype=np.uint16)[None]
    known = {255: 255} | table
    if all(value in known for value in values[0].tolist()):
        assert made(values, "m.png").tolist() == [[known[value] for value in values[0].tolist()]]
    else:
        with pytest.raises(UserError, match="m.png: id .* not in the mask map"):
            made(values, "m.png")


def test_unmapped_ids_are_counted(tmp_path):
    path = saved(tmp_path / "mask.png", np.array([[0, 9, 9], [8, 0, 255]], dtype=np.uint8))
    with pytest.raises(
        UserError, match=r"mask\.png: id 9 in 2 pixels, 8 in 1 pixels not in the mask map; .*--data.mask-map"
    ):
        mapped(path, "0=0")


def test_the_ids_of_cityscapes(tmp_path):
    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    path = saved(tmp_path / "mask.png", np.arange(34, dtype=np.uint8)[None])
    expected = [trained.index(i) if i in trained else 255 for i in range(34)]
    assert mapped(path, *cityscapes.LABEL_IDS_MAP, classes=cityscapes.CLASSES).tolist() == [expected]


# --- colours


def test_colours_of_every_kind_of_png(tmp_path):
    entries = ("#804080=road", "0,0,142=car", "#000000=ignore")
    colours = np.array([[[128, 64, 128], [0, 0, 142], [0, 0, 0]]], dtype=np.uint8)
    alpha = np.array([[[0], [7], [255]]], dtype=np.uint8)
    assert mapped(saved(tmp_path / "rgb.png", colours), *entries).tolist() == [[0, 1, 255]]
    assert mapped(saved(tmp_path / "rgba.png", np.concatenate([colours, alpha], axis=2)),
                  *entries).tolist() == [[0, 1, 255]]
    palette = Image.new("P", (3, 1))
    palette.putpalette([128, 64, 128, 0, 0, 142, 0, 0, 0])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png")
    assert mapped(tmp_path / "palette.png", *entries).tolist() == [[0, 1, 255]]
    gray = saved(tmp_path / "gray.png", np.array([[0, 255]], dtype=np.uint8))
    assert mapped(gray, "#ffffff=car", "#000000=road").tolist() == [[0, 1]]


@settings(max_examples=40, deadline=None)
@given(table=st.dictionaries(st.integers(0, 0xFFFFFF), st.sampled_from([0, 1, 2, 255]), min_size=1,
                             max_size=12), data=st.data())
def test_any_table_of_colours_is_applied(table, data):
    made = mask_map.parse([f"#{stored:06x}={target}" for stored, target in table.items()], CLASSES)
    chosen = data.draw(st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=20))
    values = np.array([[[colour >> 16, colour >> 8 & 255, colour & 255] for colour in chosen]],
                      dtype=np.uint8)
    assert made(values, "m.png").tolist() == [[table[colour] for colour in chosen]]


def test_unmapped_colours_are_counted(tmp_path):
    colours = np.zeros((2, 8, 3), dtype=np.uint8)
    colours[0, :3], colours[1, 0] = (1, 2, 3), (255, 0, 16)
    with pytest.raises(
        UserError, match=r"mask\.png: colour #010203 in 3 pixels, #ff0010 in 1 pixels not in the mask map"
    ):
        mapped(saved(tmp_path / "mask.png", colours), "#000000=road")
    colours[1] = np.arange(24).reshape(8, 3) + 100
    with pytest.raises(UserError, match=r"and 4 more not in") as refused:
        mapped(saved(tmp_path / "mask.png", colours), "#000000=road")
    assert "\n" not in str(refused.value)


def test_colours_without_a_map_are_refused_with_the_remedy(tmp_path):
    path = saved(tmp_path / "mask.png", np.array([[[1, 2, 3]]], dtype=np.uint8))
    for entries in ((), ("0=0",)):
        with pytest.raises(UserError, match=r"mask\.png: the mask holds colours .*--data\.mask-map"):
            mapped(path, *entries)


def test_sixteen_bits_have_no_colours(tmp_path):
    path = saved(tmp_path / "mask.png", np.array([[1, 300]], dtype=np.uint16))
    with pytest.raises(UserError, match=r"mask\.png: .*16-bit"):
        mapped(path, "#000000=road")


# --- grammar


def test_ranges_names_and_blanks():
    made = mask_map.parse([" 1-3 = 0-2 ", "7-9=car", "4 = ignore", "255=sky"], CLASSES)
    values = np.array([[1, 2, 3, 7, 9, 4, 255]])
    assert made(values, "m.png").tolist() == [[0, 1, 2, 1, 1, 255, 2]]
    assert mask_map.parse([], CLASSES) is None
    assert mask_map.parse(["5=ignore"], ("road", "ignore"))(np.array([[5]]), "m.png").tolist() == [[1]]


@pytest.mark.parametrize(("entries", "said"), [
    (["7"], "7: expected STORED=CLASS"),
    (["=road"], "expected STORED=CLASS"),
    (["-1=road"], "expected STORED=CLASS"),
    (["9-3=road"], "9-3=road: expected STORED=CLASS"),
    (["65536=road"], "expected STORED=CLASS"),
    (["#80408=road"], "expected STORED=CLASS"),
    (["1,2,256=road"], "expected STORED=CLASS"),
    (["7=lorry"], "7=lorry: unknown class; the classes are road, car, sky, and ignore"),
    (["7="], "unknown class"),
    (["7=3"], r"unknown class id 3; the class list has ids 0 to 2"),
    (["7=254"], "unknown class id 254"),
    (["7-9=0-1"], "maps 3 ids to 2"),
    (["7=0-1"], "maps 1 ids to 2"),
    (["7=0", "5-9=1"], "5-9=1: 7=0 already maps this"),
    (["#000000=0", "0,0,0=1"], "already maps this"),
    (["7=0", "#000000=1"], "7=0 maps ids and #000000=1 maps colours"),
])
def test_bad_entries_are_refused_in_one_line(entries, said):
    with pytest.raises(UserError, match=said) as refused:
        mask_map.parse(entries, CLASSES)
    assert "--data.mask-map" in str(refused.value) and "\n" not in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(entries=st.lists(st.text(st.sampled_from("0129-=#,af \nroadignore\u0663"), max_size=14)
                        | st.text(max_size=8), max_size=3))
def test_any_text_is_a_map_or_refused_in_one_line(entries):
    try:
        made = mask_map.parse(entries, CLASSES)
    except UserError as refused:
        assert "--data.mask-map" in str(refused) and len(str(refused).splitlines()) == 1
    else:
        assert made is None or (np.isin(made.classes, [0, 1, 2, 255]).all()
                                and (np.diff(made.stored) > 0).all())


# --- in the index


def test_index_holds_mapped_masks(tmp_path):
    root, out = tmp_path / "data", tmp_path / "index"
    for folder in ("photos", "labels"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (2, 1)).save(root / "photos" / "a.jpg")
    path = saved(root / "labels" / "a.png", np.array([[[128, 64, 128], [0, 0, 0]]], dtype=np.uint8))
    before = path.read_bytes()
    options = {"images": "photos/*.jpg", "masks": "labels/*.png", "classes": CLASSES}
    entries = ["#804080=car", "#000000=ignore"]
    made = index.prepare(root, out, mask_map=entries, progress=False, **options)
    assert masks.read_index_mask(made.sample("photos/a.jpg").mask).tolist() == [[1, 255]]
    assert made.entries["photos/a.jpg"].class_pixels == [0, 1, 0] and path.read_bytes() == before
    assert not index.is_stale(out, root, mask_map=entries, **options)
    assert index.is_stale(out, root, mask_map=["#804080=road", "#000000=ignore"], **options)
    with pytest.raises(UserError, match=r"labels/a\.png: colour #000000 in 1 pixels not in the mask map"):
        index.prepare(root, out, mask_map=entries[:1], progress=False, **options)
    with pytest.raises(UserError, match="--data.mask-map #804080=lorry"):
        index.prepare(root, out, mask_map=["#804080=lorry"], progress=False, **options)


def test_ids_outside_the_class_list_point_to_the_map(tmp_path):
    root = tmp_path / "data"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    Image.new("RGB", (2, 1)).save(root / "JPEGImages" / "a.jpg")
    saved(root / "SegmentationClass" / "a.png", np.array([[1, 7]], dtype=np.uint8))
    with pytest.raises(UserError,
                       match=r"SegmentationClass/a\.png: class id 7 in 1 pixels; .* --data\.mask-map"):
        index.prepare(root, tmp_path / "index", classes=CLASSES, progress=False)


def test_id_that_is_another_class_s_name_is_refused():
    with pytest.raises(UserError, match="1 may be the id 1, or the class named 1, which has the id 0"):
        mask_map.parse(["1=1", "2=2"], ["1", "2", "3"])
    assert mask_map.parse(["5=0", "7=1"], ["0", "1"]).classes.tolist()[:2] == [0, 1]
