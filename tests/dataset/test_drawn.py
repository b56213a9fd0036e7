"""Data sets with masks drawn from shapes of annotation tools: COCO, YOLO, labelme; and CVAT's colours."""

import base64
import io
import json
import os
import time
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cli_cases import ended, refused
from dataset_cases import photo
from shape_cases import SIZE, SQUARE, coco, coco_set, drawn, prepare, square
from stpp.annotations import labelme
from stpp.dataset import index, official, splits
from stpp.errors import UserError

NAMES = {1: "leaf", 7: "stem"}
COCO = {"layout": "coco", "masks": "annotations.json", "unlisted": "background"}
RLE = {"size": [24, 32], "counts": [5, 3, 760]}


def one(tmp_path, *annotations: dict, images: int = 1, **options):
    """Prepares a data set of one listed image with these annotations."""
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": list(annotations)}, NAMES), images=images)
    return prepare(root, **COCO | options)


# --- COCO


def test_polygons_run_lengths_and_crowds_are_drawn(tmp_path, capsys):
    runs = np.zeros((24, 32), np.uint8)
    runs[20:, 25:] = 1
    text = coco_mask.encode(np.asfortranarray(runs))["counts"].decode()
    made = one(
        tmp_path,
        {},
        {"category_id": 7, "segmentation": {"size": [24, 32], "counts": text}},
        {"category_id": 7, "iscrowd": 1, "segmentation": {"size": [24, 32], "counts": [0, 24, 744]}},
        images=3,
    )
    assert made.classes == ("background", "leaf", "stem")
    expected = square(1)
    expected[20:, 25:] = expected[:, 0] = 2
    assert (drawn(made, "photos/0.jpg") == expected).all()
    assert made.counts == {"images": 3, "masks": 1, "converted": 1}
    assert made.entries["photos/0.jpg"].class_pixels == [np.count_nonzero(expected == i) for i in range(3)]
    said = capsys.readouterr().err
    assert "pixels in no shape are the background, class 0" in said and "crowds (iscrowd): 1 region" in said
    assert made.entries["photos/0.jpg"].mask == "annotations.json"


def test_crowds_can_be_ignored(tmp_path):
    made = one(
        tmp_path,
        {"iscrowd": 1, "segmentation": {"size": [24, 32], "counts": [0, 768]}},
        {},
        crowds="ignore",
        unlisted="ignore",
    )
    assert (drawn(made, "photos/0.jpg") == square(0, 255)).all()


def test_smaller_areas_lie_on_top_whatever_their_order(tmp_path):
    small = {"category_id": 7, "segmentation": [[4, 5, 6, 5, 6, 7, 4, 7]]}
    for members in (({}, small), (small, {})):
        found = drawn(one(tmp_path, *members), "photos/0.jpg")
        assert (found[5:7, 4:6] == 2).all() and np.count_nonzero(found == 2) == 4


def test_unlisted_pixels_require_a_choice(tmp_path, capsys):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES))
    base = [
        "prepare",
        "--data.root",
        root,
        "--data.layout",
        "coco",
        "--out",
        tmp_path / "index",
        "--data.masks",
    ]
    assert "--data.unlisted background" in refused(capsys, *base, "annotations.json")
    code, out, _ = ended(
        capsys, *base, root / "annotations.json", "--data.unlisted", "ignore"
    )  # as a shell passes it
    assert code == 0 and "1 with a mask, 2 classes" in out
    made = index.load(tmp_path / "index")
    assert made.classes == ("leaf", "stem") and (drawn(made, "photos/0.jpg") == square(0, 255)).all()
    assert not index.is_stale(
        tmp_path / "index", root, layout="coco", masks="annotations.json", unlisted="ignore"
    )


def test_classes_are_found_by_name(tmp_path):
    made = one(tmp_path, {"category_id": 7}, classes=("stem", "background", "leaf"))
    assert (drawn(made, "photos/0.jpg") == np.where(square(1), 0, 1)).all()
    made = one(
        tmp_path, {"category_id": 7}, classes=("background", "plant"), mask_map=("leaf=plant", "stem=ignore")
    )
    assert (drawn(made, "photos/0.jpg") == square(255)).all()
    with pytest.raises(
        UserError,
        match=r"annotations\.json: photos/0\.jpg: annotation 1: the label 'stem' "
        r"is not a class",
    ):
        one(tmp_path, {"category_id": 7}, classes=("background", "leaf"))
    with pytest.raises(UserError, match="no label is called 'lef'; there are leaf, stem"):
        one(tmp_path, {}, mask_map=("lef=leaf",))
    with pytest.raises(UserError, match="its class 3 is not in the file's own list"):
        one(tmp_path, {"category_id": 3})
    with pytest.raises(UserError, match="no class is called background"):
        one(tmp_path, {}, classes=("leaf", "stem"))


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        ({"segmentation": [[1, 1, 5, 5]]}, "2 distinct points"),
        ({"segmentation": [[1, 1, 5, 5, 9]]}, "not a list of alternating x and y"),
        ({"segmentation": [[0, 0, 20, 20, 20, 0, 0, 20]]}, "crosses itself"),
        ({"segmentation": [[0, 0, 90, 0, 90, 20]]}, "58 pixels outside the image of 32x24"),
        ({"segmentation": [[0, 0, float("nan"), 0, 9, 9]]}, "invalid or out-of-range"),
        ({"segmentation": [[0, 0, float("inf"), 0, 9, 9]]}, "invalid or out-of-range"),
        ({"segmentation": [[0, 0, 10**400, 0, 9, 9]]}, "alternating x and y"),
        ({"segmentation": [[0, 0, 1e300, 0, 9, 9]]}, "out-of-range coordinate"),
        ({"segmentation": []}, "no polygon and no mask"),
        ({"segmentation": [], "bbox": [1, 1, 5, 5]}, "no polygon and no mask"),
        ({"segmentation": "x"}, "no polygon and no mask"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "not a list of polygons"),
        ({"segmentation": {"counts": [1]}}, r"no size \[height, width\]"),
        ({"segmentation": {"size": [24, 32], "counts": [2**31]}}, "too large for a mask of this size"),
        ({"segmentation": {"size": [24, 32], "counts": [3, 4]}}, "add up to 7 pixels, not to 32x24"),
        ({"segmentation": {"size": [24, 32], "counts": [3.5]}}, "no counts"),
        ({"segmentation": {"size": [24, 32], "counts": "ooooooooooo0"}}, "a number too large for any mask"),
        ({"segmentation": {"size": [24, 32], "counts": "o"}}, "cut short"),
        ({"segmentation": {"size": [24, 32], "counts": "\u00e9"}}, "characters that are not run lengths"),
        (
            {"segmentation": {"size": [50000, 50000], "counts": [2500000000]}},
            "has 50000x50000 pixels, but the image has",
        ),
        ({"category_id": "1"}, "has no numeric category_id"),
    ],
)
def test_undrawable_annotations_are_named(tmp_path, annotation, says):
    with pytest.raises(UserError, match=says) as error:
        one(tmp_path, {}, annotation)
    assert "annotations.json: photos/0.jpg: annotation 2" in str(error.value) and "\n" not in str(error.value)
    assert "annotation 2" in (tmp_path / "index" / "problems.txt").read_text()
    assert not (tmp_path / "index" / "index.json").exists()


def test_doubtful_shapes_can_be_ignored(tmp_path, capsys):
    bow = {"id": 9, "segmentation": [[0, 0, 20, 20, 20, 0, 0, 20]]}
    point = {"id": 10, "segmentation": [[1, 1, 5, 5]]}
    box = {"id": 11, "segmentation": [], "bbox": [26, 20, 4, 3]}
    found = drawn(one(tmp_path, bow, point, box, doubtful="ignore"), "photos/0.jpg")
    assert set(np.unique(found)) == {0, 255} and 150 < np.count_nonzero(found == 255) < 260
    assert (found[20:23, 26:30] == 255).all()
    assert "3 doubtful shapes" in capsys.readouterr().err
    with pytest.raises(UserError, match="no numeric category_id"):
        one(tmp_path, {"category_id": None}, doubtful="ignore")


def test_every_problem_is_listed(tmp_path):
    images = {f"photos/{i}.jpg": [{"segmentation": [[1, 1, 5, 5]]}] * (8 if i == 1 else 1) for i in range(3)}
    root = coco_set(tmp_path / "data", coco(images, NAMES))
    with pytest.raises(UserError, match="7 problems, all listed in"):
        prepare(root, **COCO)
    text = (tmp_path / "index" / "problems.txt").read_text()
    assert len(text.splitlines()) == 7 and "and 3 more in this image" in text


@pytest.mark.parametrize(
    "name",
    ["../0.jpg", "/etc/passwd.jpg", "photos/../../0.jpg", "C:\\x\\0.jpg", "..\\0.jpg", "~/0.jpg", "a\0b.jpg"],
)
def test_names_that_lead_outside_are_refused(tmp_path, name):
    photo(tmp_path / "0.jpg")
    root = coco_set(tmp_path / "data", coco({name: [{}]}, NAMES))
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="leads outside the data root") as error:
        prepare(root, **COCO)
    assert "\n" not in str(error.value)
    assert {str(path) for path in tmp_path.rglob("*")} - before <= {str(tmp_path / "index")}


def test_images_are_found_by_the_names_of_tools(tmp_path, capsys):
    for name, file in (
        ("photos/0.jpg", "annotations.json"),
        ("0.jpg", "annotations.json"),
        ("0.jpg", "photos/_annotations.coco.json"),
        (".\\photos\\0.jpg", "a/b.json"),
    ):
        root = coco_set(
            tmp_path / name.replace("\\", "-") / file / "data", coco({name: [{}]}, NAMES), name=file
        )
        made = prepare(root, layout="coco", masks=file, unlisted="background")
        assert (drawn(made, "photos/0.jpg") == square(1)).all()
        by_end = (name, file) == ("0.jpg", "annotations.json")
        assert ("matched only by the end of the path" in capsys.readouterr().err) == by_end


def test_ambiguous_image_name_is_refused(tmp_path):
    root = coco_set(tmp_path / "data", coco({"0.jpg": [{}]}, NAMES))
    photo(root / "more" / "0.jpg")
    with pytest.raises(UserError, match=r"may be more/0\.jpg or photos/0\.jpg"):
        prepare(root, **COCO)
    made = prepare(root, **COCO, images="photos/**/*")
    assert list(made.entries) == ["photos/0.jpg", "photos/1.jpg", "photos/2.jpg"]


def test_listed_images_without_annotations_or_files_are_reported(tmp_path, capsys):
    images = {"photos/0.jpg": [{}], "photos/1.jpg": [], "photos/gone.jpg": [{}]}
    made = prepare(coco_set(tmp_path / "data", coco(images, NAMES)), **COCO)
    said = capsys.readouterr().err
    assert (
        "1 listed image without an annotation, treated as unlabelled" in said and "photos/1.jpg" in said
    )
    assert (
        "warning: annotations.json: 1 listed image missing, for example photos/gone.jpg" in said
    )
    assert made.entries["photos/1.jpg"].mask is None
    with pytest.raises(UserError, match="none of its 1 images is below"):
        prepare(coco_set(tmp_path / "data", coco({"nowhere.jpg": [{}]}, NAMES)), **COCO)
    with pytest.raises(UserError, match="no image has shapes"):
        prepare(coco_set(tmp_path / "data", coco({"photos/0.jpg": []}, NAMES)), **COCO)


def test_several_files_form_one_data_set_with_official_validation(tmp_path):
    root = tmp_path / "data"
    for number, part in enumerate(("train2017", "val2017")):
        for image in range(2):
            photo(root / part / f"{number}{image}.jpg", 2 * number + image)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(
            json.dumps(coco({f"{number}{image}.jpg": [{}] for image in range(2)}, NAMES))
        )
    made = prepare(root, layout="coco", masks="annotations/instances_*.json", unlisted="background")
    assert made.counts["masks"] == 4 and official.validation(made) == {"val2017/10.jpg", "val2017/11.jpg"}
    splits.make_split(made, tmp_path / "lists", fraction="1/1")
    text = (tmp_path / "lists" / "labeled.txt").read_text()
    assert text == "".join(f"train2017/0{i}.jpg annotations/instances_train2017.json\n" for i in range(2))
    assert len(splits.read_split(tmp_path / "lists" / "labeled.txt", made, labelled=True)) == 2
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"stem"', '"stalk"'))
    with pytest.raises(UserError, match="category 7 is 'stalk', but 'stem' in another file"):
        prepare(root, layout="coco", masks="annotations/instances_*.json", unlisted="background")


def test_an_image_listed_twice_is_refused(tmp_path):
    value = coco({"photos/0.jpg": [{}], "./photos/0.jpg": [{}]}, NAMES)
    with pytest.raises(UserError, match=r"photos/0\.jpg is listed twice"):
        prepare(coco_set(tmp_path / "data", value), **COCO)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": [{"id": 1}]}, r"images\[0\]: has no file_name"),
        ({"images": [{"file_name": "a.jpg"}]}, r"images\[0\]: has no id"),
        (
            {"images": [{"id": 1, "file_name": "photos/0.jpg", "width": -4, "height": 3}]},
            r"images\[0\]: its "
            r"width and",
        ),
        ({"images": [7]}, r"images\[0\]: expected an object"),
        ({"images": []}, "has no list `images`"),
        ({"categories": []}, "has no list `categories`"),
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            r"categories\[1\]: its id 1 is not unique",
        ),
        ({"categories": [{"id": "a", "name": "a"}]}, r"categories\[0\]: its id 'a' is not a number"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: has no name"),
        ({"annotations": [{"image_id": 99}]}, r"annotations\[0\]: its image_id 99 is not in `images`"),
        ({"annotations": [{"image_id": 1}, {"id": 2}]}, r"annotations\[1\]: has no image_id"),
        ({"annotations": [None]}, r"annotations\[0\]: expected an object"),
        (
            {"annotations": [{"image_id": 1, "x": [[[[]]]]}], "images": [{"id": [], "file_name": "a"}]},
            "has no id",
        ),
    ],
)
def test_files_that_are_no_coco_are_refused_with_the_entry(tmp_path, change, says):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES) | change)
    with pytest.raises(UserError, match=says) as error:
        prepare(root, **COCO)
    assert "annotations.json" in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_is_drawn_or_refused_in_one_line(tmp_path, data):
    """Replaces a value anywhere in a good file; nothing is written except the index."""
    root = tmp_path / "data"
    if not root.exists():
        coco_set(root, "")
    value = json.loads(json.dumps(coco({"photos/0.jpg": [{}, {"segmentation": RLE}]}, NAMES)))
    at = value
    while True:
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or data.draw(st.integers(0, 4)) == 0:
            break
        at = at[key]
    odd = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=6)
        | st.sampled_from([10**400, 2**31, -1, "../x.jpg", 1e308, [[0, 0] * 3], {"size": [1, 1]}]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
        max_leaves=4,
    )
    at[key] = data.draw(odd)
    (root / "annotations.json").write_text(json.dumps(value))
    try:
        made = prepare(root, **COCO)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert drawn(made, "photos/0.jpg").shape == (24, 32)
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "index"}


def test_changed_file_makes_the_index_stale_and_is_read_again(tmp_path):
    made = one(tmp_path, {})
    assert not index.is_stale(made.out, made.root, **COCO) and made.changed(["photos/0"]) == []
    path = made.root / "annotations.json"
    path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 7'))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    assert index.is_stale(made.out, made.root, **COCO) and made.changed(["photos/0"]) == ["annotations.json"]
    assert (drawn(index.renewed(made.out), "photos/0.jpg") == square(2)).all()


def test_links_out_of_the_root_are_followed_only_when_asked(tmp_path):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES))
    (root / "annotations.json").rename(tmp_path / "outside.json")
    (root / "annotations.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(UserError, match="is a link out of .*--data.follow-links"):
        prepare(root, **COCO)
    assert (drawn(prepare(root, **COCO, follow_links=True), "photos/0.jpg") == square(1)).all()
    with pytest.raises(UserError, match="is outside"):
        prepare(root, **COCO | {"masks": str(tmp_path / "outside.json")})
    with pytest.raises(UserError, match="no such file under"):
        prepare(root, **COCO | {"masks": "gone.json"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "coco", "unlisted": "ignore"}, "needs --data.masks"),
        ({"layout": "voc", "unlisted": "ignore"}, "--data.unlisted ignore: needs --data.layout coco"),
        (
            {"layout": "yolo", "unlisted": "ignore", "crowds": "class"},
            "--data.crowds class: needs --data.layout coco",
        ),
        ({"layout": "yolo", "unlisted": "ignore", "images": "a/*"}, "give both patterns"),
        (COCO | {"annotated": "upright", "exif": False}, "conflicts with --data.no-exif"),
        (COCO | {"mask_map": ("leaf",)}, "expected LABEL=CLASS"),
        (COCO | {"mask_map": ("leaf=tree",)}, "unknown class"),
    ],
)
def test_conflicting_settings_are_refused(tmp_path, options, says):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES))
    (root / "JPEGImages").mkdir()
    with pytest.raises(UserError, match=says):
        prepare(root, **options)


def test_many_images_are_drawn_on_all_cores(tmp_path):
    images = {
        f"photos/{i}.jpg": [{"segmentation": [[i % 9, 3, i % 9 + 5, 3, i % 9 + 5, 9, i % 9, 9]]}]
        for i in range(140)
    }
    root = coco_set(tmp_path / "data", coco(images, NAMES), images=140)
    made = index.prepare(root, tmp_path / "index", progress=False, workers=2, **COCO)
    assert made.counts == {"images": 140, "masks": 140, "converted": 140}
    for i in (0, 77, 139):
        expected = np.zeros((24, 32), np.uint8)
        expected[3:9, i % 9 : i % 9 + 5] = 1
        assert (drawn(made, f"photos/{i}.jpg") == expected).all()


# --- EXIF


def turned(path: Path, turn: int) -> None:
    """Writes a photograph of 32x24 stored pixels with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = turn
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (9, 99, 200)).save(path, exif=exif)


def test_shapes_are_drawn_on_the_upright_or_the_stored_image(tmp_path, capsys):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES))
    turned(root / "photos" / "0.jpg", 3)  # upside down: the size does not reveal it
    assert (drawn(prepare(root, **COCO), "photos/0.jpg") == square(1)).all()
    said = capsys.readouterr().err
    assert "EXIF rotates 1 labelled image" in said and "--data.annotated stored" in said
    assert (drawn(prepare(root, **COCO, annotated="stored"), "photos/0.jpg") == square(1)[::-1, ::-1]).all()
    assert (drawn(prepare(root, **COCO, exif=False), "photos/0.jpg") == square(1)).all()
    assert "--data.annotated upright" not in capsys.readouterr().err.splitlines()[-1]


def test_wrong_size_is_reported_with_the_remedy(tmp_path):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES))
    turned(root / "photos" / "0.jpg", 6)
    with pytest.raises(
        UserError,
        match=r"says that photos/0\.jpg has 32x24 pixels, but it has 24x32; they "
        r"match with "
        "--data.annotated stored, as the image's EXIF orientation is 6",
    ):
        prepare(root, **COCO)
    found = drawn(prepare(root, **COCO, annotated="stored"), "photos/0.jpg")
    assert (found == np.rot90(square(1), -1)).all()
    photo(root / "photos" / "0.jpg", 1, (64, 48))
    with pytest.raises(
        UserError, match="has 32x24 pixels, but it has 64x48; the shapes were drawn at another size"
    ):
        prepare(root, **COCO)


# --- YOLO


def yolo_set(root: Path, lines: dict[str, str], names=("leaf", "stem"), images: str = "images/train") -> Path:
    for number, (name, text) in enumerate(lines.items()):
        photo(root / images / f"{name}.jpg", number)
        path = root / images.replace("images", "labels") / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "data.yaml").write_text(f"names: {json.dumps(names)}\n")
    return root


def shares(points: list[float]) -> str:
    return " ".join(str(value / SIZE[i % 2]) for i, value in enumerate(points))


@pytest.mark.parametrize("images", ["images/train", "train/images", "images", "photos"])
def test_yolo_texts_are_drawn(tmp_path, images):
    root = yolo_set(
        tmp_path / "data",
        {"a": f"0 {shares(SQUARE)}\n\n1 {shares([4, 5, 6, 5, 6, 7, 4, 7])} ", "b": ""},
        images=images,
    )
    photo(root / images / "c.jpg", 9)
    made = prepare(root, layout="yolo", unlisted="background")
    expected = square(1)
    expected[5:7, 4:6] = 2
    assert (
        made.classes == ("background", "leaf", "stem") and (drawn(made, f"{images}/a.jpg") == expected).all()
    )
    assert not drawn(made, f"{images}/b.jpg").any() and made.entries[f"{images}/c.jpg"].mask is None


def test_two_patterns_pair_texts_and_images(tmp_path):
    root = yolo_set(tmp_path / "data", {"a": f"1 {shares(SQUARE)}"}, images="photos")
    (root / "texts").mkdir()
    (root / "photos" / "a.txt").rename(root / "texts" / "a_poly.txt")
    made = prepare(
        root, layout="yolo", unlisted="ignore", images="photos/**/*.jpg", masks="texts/**/*_poly.txt"
    )
    assert (drawn(made, "photos/a.jpg") == square(1, 255)).all()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 1: it has four numbers: a box, not a polygon"),
        ("0 0.1 0.1 0.5 0.5 0.9", "line 1: its polygon is not a list of alternating x and y"),
        ("0 0.1 0.1 0.5 0.1 2.5 0.9", "line 1: it lies 48 pixels outside"),
        ("leaf 0.1 0.1 0.5 0.1 0.5 0.9", "line 1: begins with 'leaf'"),
        ("0 0.1 0.1 x 0.1 0.5 0.9", "line 1: holds a value that is not a number"),
        ("0 nan 0.1 0.2 0.1 0.5 0.9", "line 1: its polygon has an invalid or out-of-range coordinate"),
        ("9 0.1 0.1 0.5 0.1 0.5 0.9", "line 1: its class 9 is not in the file's own list"),
        ("0", "not a list of alternating x and y"),
        ("99999999999999999999 0.1 0.1 0.5 0.1 0.5 0.9", "not a class number"),
    ],
)
def test_lines_without_a_polygon_are_reported(tmp_path, line, says):
    root = yolo_set(tmp_path / "data", {"a": line})
    with pytest.raises(UserError, match=says) as error:
        prepare(root, layout="yolo", unlisted="background")
    assert "labels/train/a.txt: images/train/a.jpg: line 1" in str(error.value)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["0", "1", "0.5", "nan", "-1", "1e9", "\n", "7"])).map(" ".join)
)
def test_any_text_is_drawn_or_refused_in_one_line(tmp_path, text):
    root = yolo_set(tmp_path / "data", {"a": ""})
    (root / "labels" / "train" / "a.txt").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        prepare(root, layout="yolo", unlisted="background")
    except UserError as error:
        assert "\n" not in str(error)


def test_two_texts_of_one_image_are_refused(tmp_path):
    root = yolo_set(tmp_path / "data", {"a": ""})
    (root / "images" / "train" / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.9")
    with pytest.raises(UserError, match=r"a\.txt and .*a\.txt both belong to images/train/a\.jpg"):
        prepare(root, layout="yolo", unlisted="background")


def test_yolo_numbers_without_names_are_refused(tmp_path):
    root = yolo_set(tmp_path / "data", {"a": ""})
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match="no file names the numbered classes"):
        prepare(root, layout="yolo", unlisted="background", classes=("background", "leaf"))


# --- labelme


def labelme_set(root: Path, *shapes: dict, **more) -> Path:
    photo(root / "photos" / "0.jpg")
    (root / "classes.json").write_text('["background", "leaf", "stem"]')
    square_of = [[SQUARE[i], SQUARE[i + 1]] for i in range(0, 8, 2)]
    value = {
        "version": "5.4.1",
        "shapes": [{"label": "leaf", "points": square_of, "shape_type": "polygon"} | one for one in shapes],
        "imagePath": "0.jpg",
        "imageData": None,
        "imageHeight": 24,
        "imageWidth": 32,
    }
    (root / "photos" / "0.json").write_text(json.dumps(value | more))
    return root


def bitmap(values: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_labelme_shapes_are_drawn_in_order(tmp_path):
    root = labelme_set(
        tmp_path / "data",
        {"label": "stem", "shape_type": "rectangle", "points": [[20, 8], [4, 4]]},
        {"label": "leaf"},  # larger and later: on top, as in labelme's own export
        {"label": "stem", "shape_type": "circle", "points": [[26, 18], [26, 22]]},
        {
            "label": "__ignore__",
            "shape_type": "mask",
            "points": [[1, 20], [3, 21]],
            "mask": bitmap(np.array([[1, 0, 1], [1, 1, 1]])),
        },
    )
    found = drawn(prepare(root, layout="labelme", unlisted="background"), "photos/0.jpg")
    assert (found[3:13, 2:12] == 1).all() and (found[4:8, 12:20] == 2).all()
    assert 40 < np.count_nonzero(found[14:, 20:] == 2) < 60 and found[18, 26] == 2
    assert found[20:22, 1:4].tolist() == [[255, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize(
    ("shape", "more", "says"),
    [
        ({"shape_type": "line"}, {}, r"shapes\[0\]: a line covers no pixels"),
        (
            {"shape_type": "rectangle"},
            {"shapes": [{"label": "a", "points": [[1, 2]] * 3, "shape_type": "rectangle"}]},
            "a rectangle needs two points",
        ),
        ({"label": "tree"}, {}, "the label 'tree' is not a class"),
        ({"label": 3}, {}, "expected an object with a label"),
        ({"points": [[1, 1], [2, 2]]}, {}, "2 distinct points"),
        ({"points": "x"}, {}, "not a list of alternating x and y"),
        ({"shape_type": "mask", "mask": "!!", "points": [[1, 2], [3, 4]]}, {}, "its mask cannot be read"),
        ({}, {"imageWidth": 640, "imageHeight": 480}, "has 640x480 pixels, but it has 32x24"),
        ({}, {"imagePath": "..\\photos\\1.jpg"}, "its imagePath names another image, "),
        ({}, {"shapes": 3}, "has no list `shapes`"),
    ],
)
def test_labelme_shapes_without_area_are_reported(tmp_path, shape, more, says):
    with pytest.raises(UserError, match=says) as error:
        prepare(labelme_set(tmp_path / "data", shape, **more), layout="labelme", unlisted="background")
    assert "photos/0.json" in str(error.value) and "\n" not in str(error.value)


def test_json_without_image_causes_a_warning_and_deep_nesting_is_refused(tmp_path, capsys):
    root = labelme_set(tmp_path / "data", {})
    (root / "photos" / "9.json").write_text("{}")
    prepare(root, layout="labelme", unlisted="background")
    assert "1 shape file without an image, for example photos/9.json" in capsys.readouterr().err
    (root / "photos" / "0.json").write_text('{"shapes": ' + "[" * 100_000)
    with pytest.raises(
        UserError,
        match=r"photos/0\.json: cannot be read as labelme's JSON \(nested too "
        r"deeply\)",
    ):
        prepare(root, layout="labelme", unlisted="background")


# --- CVAT


def cvat_set(
    root: Path,
    labelmap: str = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nleaf:50,183,250::\n"
    "void:224,224,192::\nstem:131,224,112::\n",
) -> Path:
    photo(root / "JPEGImages" / "a" / "0.jpg")
    photo(root / "JPEGImages" / "a" / "1.jpg", 1)
    colours = np.zeros((24, 32, 3), np.uint8)
    colours[3:13, 2:12], colours[20:, :] = (131, 224, 112), (224, 224, 192)
    path = root / "SegmentationClass" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(colours).save(path)
    (root / "labelmap.txt").write_text(labelmap)
    return root


def test_labelmap_colours_are_read_automatically(tmp_path):
    root = cvat_set(tmp_path / "data")
    made = prepare(root)
    expected = square(2)
    expected[20:] = 255
    assert (made.layout, made.classes) == ("cvat", ("background", "leaf", "stem"))
    assert (drawn(made, "JPEGImages/a/0.jpg") == expected).all()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a/0\n")
    (lists / "val.txt").write_text("a/1\n")
    assert official.validation(prepare(root)) == {"JPEGImages/a/1.jpg"}


def test_images_may_lie_outside_the_export(tmp_path):
    root = cvat_set(tmp_path / "data")
    (root / "JPEGImages").rename(root / "photos")
    made = prepare(root, layout="cvat", images="photos/**/*")
    assert (drawn(made, "photos/a/0.jpg")[3:13, 2:12] == 2).all()
    assert index.renewed(made.out).fingerprint == made.fingerprint


@pytest.mark.parametrize(
    ("labelmap", "options", "says"),
    [
        ("background:0,0,0::\nleaf:1,2,3::\nstem:1,2,3::\n", {}, "share the colour"),
        ("background:0,0,0::\nleaf:1,2,300::\n", {}, "values end at 255"),
        ("background:0,0,0::\nleaf:::\n", {"layout": "cvat"}, "is missing or has no colours"),
        ("background:0,0,0::\nleaf:9,9,9::\n", {}, "not in the mask map"),
        (None, {"classes": ("background", "leaf")}, "'stem' is not a class"),
    ],
)
def test_invalid_labelmaps_are_refused(tmp_path, labelmap, options, says):
    root = cvat_set(tmp_path / "data", *[labelmap] * bool(labelmap))
    with pytest.raises(UserError, match=says):
        prepare(root, **options)


def test_images_without_annotation_follow_the_json_that_lists_them(tmp_path):
    """Of one flat folder: an image of the validation or test JSON without an object is not trained on."""
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}], "photos/1.jpg": []}, NAMES),
                    name="instances_train.json", images=6)
    coco_set(root, coco({"photos/2.jpg": [{}], "photos/3.jpg": []}, NAMES), name="instances_val.json")
    coco_set(root, coco({"photos/4.jpg": [], "photos/5.jpg": []}, NAMES), name="instances_test.json")
    made = prepare(root, layout="coco", masks="instances_*.json", unlisted="background")
    assert official.validation(made) == {"photos/2.jpg", "photos/3.jpg"}
    assert official.test(made) == {"photos/4.jpg", "photos/5.jpg"}
    splits.make_split(made, tmp_path / "lists", fraction="1/1")
    assert (tmp_path / "lists" / "unlabeled.txt").read_text() == "photos/1.jpg\n"
    assert index.load(made.out).entries["photos/3.jpg"].listed == "instances_val.json"


def test_json_file_names_define_the_official_validation(tmp_path):
    root = coco_set(tmp_path / "data", coco({"photos/0.jpg": [{}]}, NAMES), name="instances_train.json")
    coco_set(root, coco({"photos/1.jpg": [{}]}, NAMES), name="instances_val-2017.json")
    made = prepare(root, layout="coco", masks="instances_*.json", unlisted="background")
    assert official.validation(made) == {"photos/1.jpg"} and official.in_folders(made, "train") == {
        "photos/0.jpg"
    }


@pytest.mark.slow
def test_run_trains_on_drawn_masks_and_resumes_after_changes(tmp_path, capsys):
    outlines = [[i, 3, i + 8, 3, i + 8, 20, i, 20] for i in range(12)]
    images = {f"photos/{i}.jpg": [{"segmentation": [outline]}] for i, outline in enumerate(outlines)}
    root = coco_set(tmp_path / "data", coco(images, NAMES), images=14)
    flags = (
        "--method supervised --data.layout coco --data.masks annotations.json --data.unlisted background "
        "--data.fraction 1/1 --data.val 0.3 --device cpu --model.backbone resnet18 --model.output-stride 16 "
        "--augment.crop-px 33 --augment.long-side 32 48 --train.epochs 1 --train.batch-global 2 "
        "--train.precision fp32 --data.threads 1 --data.loader reference"
    )
    code, _, errors = ended(capsys, "train", "--data.root", root, *flags.split(), "--out", tmp_path / "run")
    assert code == 0, errors
    best = tmp_path / "run" / "stages" / "1-supervised" / "best.pt"
    path = root / "annotations.json"
    path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 7'))
    code, _, errors = ended(capsys, "evaluate", "--checkpoint", best, "--tta", "none", "--device", "cpu")
    assert code == 0 and "preparing the index again" in errors, errors
    assert index.load(tmp_path / "run" / "index").entries["photos/0.jpg"].class_pixels[1] == 0


def test_yolo_names_in_another_order_make_the_index_stale(tmp_path):
    root = yolo_set(tmp_path / "data", {"a": f"0 {shares(SQUARE)}"})
    options = {"layout": "yolo", "unlisted": "background", "classes": ("background", "leaf", "stem")}
    made = prepare(root, **options)
    assert (drawn(made, "images/train/a.jpg") == square(1)).all()
    (root / "data.yaml").write_text("names: [stem, leaf]\n")
    assert index.is_stale(made.out, root, **options)
    assert (drawn(prepare(root, **options), "images/train/a.jpg") == square(2)).all()


@pytest.mark.parametrize("doubtful", [{}, {"doubtful": "ignore"}])
@pytest.mark.parametrize("segmentation", [{"size": [12, 16], "counts": [0, 192]},
                                          {"size": [24, 32], "counts": [5, 3, 7]}])
def test_run_lengths_that_fit_no_pixels_are_never_background(tmp_path, segmentation, doubtful):
    with pytest.raises(UserError, match="but the image has 32x24|its counts add up to"):
        one(tmp_path, {"segmentation": segmentation}, **doubtful)


def test_polygons_without_an_area_beside_others_are_doubtful(tmp_path):
    polygons = [list(SQUARE), [20, 20, 21, 21]]
    with pytest.raises(UserError, match="it has 2 distinct points"):
        one(tmp_path / "refused", {"segmentation": polygons})
    made = one(tmp_path / "ignored", {"segmentation": polygons}, doubtful="ignore")
    assert (drawn(made, "photos/0.jpg") == square(255)).all()


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_annotations_under_two_names_of_one_file_are_refused(tmp_path, link):
    value = coco({"photos/0.jpg": [{}], "photos/twin.jpg": [{"category_id": 7}]}, NAMES)
    root = coco_set(tmp_path / "data", value, images=1)
    link(root / "photos" / "0.jpg", root / "photos" / "twin.jpg")
    with pytest.raises(UserError, match=r"are one file, .* annotations\.json has annotations for each"):
        prepare(root, **COCO)


def test_label_mapped_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="'leaf' is mapped twice"):
        one(tmp_path, {}, mask_map=["leaf=stem", "leaf=ignore"])


def test_many_large_bitmaps_of_labelme_need_little_memory(tmp_path):
    png = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000), bool)).save(png, "PNG")
    shape = {"label": "leaf", "shape_type": "mask", "points": [[0, 0], [1, 1]],
             "mask": base64.b64encode(png.getvalue()).decode()}
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [shape] * 20}))
    tracemalloc.start()
    annotated = labelme.read(tmp_path / "a.json")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(annotated.shapes) == 20 and kept < 16 << 20  # decoded: 320 MB


def test_labelme_names_are_compared_in_one_normalisation(tmp_path):
    path = tmp_path / (unicodedata.normalize("NFD", "é") + ".json")
    path.write_text(json.dumps({"shapes": [], "imagePath": unicodedata.normalize("NFC", "é") + ".jpg"}))
    assert labelme.read(path).problems == []
