"""Labels exported to annotation tools and imported again: the same masks, read by the tools' own readers."""

import io
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pycocotools.coco import COCO

import exported_cases as cases
import label_cases
from cli_cases import ended, refused
from shape_cases import drawn, prepare
from stpp.annotations import runs
from stpp.dataset import class_files, given_labels, index
from stpp.images.masks import read_index_mask
from stpp.images.palette import voc_colours
from stpp.report import run as report_run

ROOT = Path(__file__).parents[2]
READERS = ROOT / "build" / "readers" / "bin" / "python"
"""Environment of the tools' own readers (`make readers`), which need other packages."""
RELAXED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
MASKS = {
    f"{('a', 'b/c')[i % 2]}/image {i}": np.kron(
        np.random.default_rng(i).choice(np.array([0, 1, 2, 255], np.uint8), (4, 5)), np.ones((6, 7), np.uint8)
    )
    for i in range(6)
}
KINDS = [
    ("cvat", "out"),
    ("cvat", "out.zip"),
    ("coco", "out.json"),
    ("yolo", "out"),
    ("label-studio", "out.json"),
]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return cases.labels(tmp_path_factory.mktemp("labels") / "labels", MASKS)


def export(capsys, labels: Path, form: str, out: Path, *flags: object) -> str:
    """Exports; returns the messages."""
    code, said, errors = ended(
        capsys, "export-labels", labels, "--format", form, "--out", out, "--workers", "1", *flags
    )
    assert code == 0, errors
    return said + errors


def in_again(root: Path, form: str, out: Path, masks, **options) -> index.Index:
    """Prepares the data set whose labels were exported, with its export."""
    photos = "JPEGImages" if form == "cvat" else "images" if form == "yolo" else "photos"
    cases.data_set(root, masks, photos)
    if form == "cvat":
        shutil.copytree(out, root, dirs_exist_ok=True)
        return prepare(root, **options)
    if form == "yolo":
        shutil.copytree(out, root, dirs_exist_ok=True)
        return prepare(root, layout="yolo", **options)
    shutil.copy(out, root / "annotations.json")
    return prepare(root, layout="coco", masks="annotations.json", **options)


def without_ignored(mask: np.ndarray) -> np.ndarray:
    return np.where(mask == 255, 0, mask)


# --- import of exports


def test_cvat_export_and_import_give_the_same_masks(tmp_path, labels, capsys):
    said = export(capsys, labels, "cvat", tmp_path / "out")
    assert "6 images" in said and "ignored" not in said
    made = in_again(tmp_path / "data", "cvat", tmp_path / "out", MASKS)
    assert (made.layout, made.classes) == ("cvat", cases.NAMES)
    for key, mask in MASKS.items():
        assert (drawn(made, f"JPEGImages/{key}.jpg") == mask).all()


@pytest.mark.parametrize(("form", "flags"), [("coco", []), ("coco", ["--polygons"]), ("yolo", [])])
def test_shapes_export_and_import_give_the_same_masks_except_ignored_pixels(tmp_path, labels, capsys, form,
                                                                            flags):
    out = tmp_path / ("out.json" if form == "coco" else "out")
    ignored = sum(int((mask == 255).sum()) for mask in MASKS.values())
    said = export(capsys, labels, form, out, *flags)
    assert f"{ignored} pixels of 6 images are ignored (255), which {form} cannot store" in said
    made = in_again(tmp_path / "data", form, out, MASKS, unlisted="background")
    folder = "images" if form == "yolo" else "photos"
    assert made.classes == cases.NAMES
    for key, mask in MASKS.items():
        assert (drawn(made, f"{folder}/{key}.jpg") == without_ignored(mask)).all()


@RELAXED
@given(
    masks=st.lists(cases.masks(), min_size=1, max_size=3),
    polygons=st.booleans(),
    form=st.sampled_from(["cvat", "coco", "yolo"]),
)
def test_any_masks_survive_export_and_import(tmp_path, capsys, masks, polygons, form):
    named = {f"{i}": mask for i, mask in enumerate(masks)}
    shutil.rmtree(tmp_path, ignore_errors=True)
    out = tmp_path / ("out.json" if form == "coco" else "out")
    export(
        capsys,
        cases.labels(tmp_path / "labels", named),
        form,
        out,
        *["--polygons"] * (polygons and form == "coco"),
    )
    if form != "cvat" and not any((mask % 255).any() for mask in masks):
        return  # nothing is labelled there
    options = {} if form == "cvat" else {"unlisted": "background"}
    made = in_again(tmp_path / "data", form, out, named, **options)
    folder = {"cvat": "JPEGImages", "yolo": "images"}.get(form, "photos")
    for key, mask in named.items():
        entry = made.entries[f"{folder}/{key}.jpg"]
        expected = mask if form == "cvat" else without_ignored(mask)
        if entry.mask is None:  # COCO lists it without an annotation
            assert form == "coco" and not expected.any()
        else:
            assert (drawn(made, entry.image) == expected).all()


def test_classes_without_a_background(tmp_path, capsys):
    masks = {"0": np.array([[0, 1], [255, 1]], np.uint8)}
    labels = cases.labels(tmp_path / "labels", masks, classes=("road", "sky"))
    export(capsys, labels, "cvat", tmp_path / "cvat")
    made = in_again(tmp_path / "data", "cvat", tmp_path / "cvat", masks, classes=("road", "sky"))
    assert (drawn(made, "JPEGImages/0.jpg") == masks["0"]).all()
    export(capsys, labels, "coco", tmp_path / "coco.json")
    made = in_again(tmp_path / "coco", "coco", tmp_path / "coco.json", masks, unlisted="ignore")
    assert made.classes == ("road", "sky") and (drawn(made, "photos/0.jpg") == masks["0"]).all()


def test_the_background_may_be_any_class(tmp_path, capsys):
    names, masks = ("leaf", "_background_", "stem"), {"0": np.array([[0, 1, 1], [2, 1, 0]], np.uint8)}
    labels = cases.labels(tmp_path / "labels", masks, classes=names)
    export(capsys, labels, "cvat", tmp_path / "cvat")
    made = in_again(tmp_path / "data", "cvat", tmp_path / "cvat", masks, classes=names)
    assert (drawn(made, "JPEGImages/0.jpg") == masks["0"]).all()
    export(capsys, labels, "coco", tmp_path / "coco.json")
    made = in_again(
        tmp_path / "coco", "coco", tmp_path / "coco.json", masks, unlisted="background", classes=names
    )
    assert (drawn(made, "photos/0.jpg") == masks["0"]).all()


def test_masks_of_cvat_serve_as_pseudo_labels(tmp_path, labels, capsys):
    """Labelled, exported, corrected, exported from CVAT, and given to --method retrain."""
    root = cases.data_set(tmp_path / "data", MASKS, "photos")
    key = next(iter(MASKS))
    (root / "labels" / key).parent.mkdir(parents=True)
    Image.fromarray(without_ignored(MASKS[key])).save(root / "labels" / f"{key}.png")
    known = prepare(root, layout="globs", images="photos/**/*", masks="labels/**/*.png", classes=cases.NAMES)
    export(capsys, labels, "cvat", tmp_path / "out")
    samples = [known.sample(image) for image in known.entries if known.entries[image].mask is None]
    given_labels.check(samples, tmp_path / "out", known, tmp_path / "given")
    attached = given_labels.attach(samples, tmp_path / "given")
    assert len(attached) == 5
    for sample in attached:
        with Image.open(sample.mask) as file:
            assert file.mode == "L" and (np.asarray(file) == MASKS[sample.key.removeprefix("photos/")]).all()


# --- the tools' own readers


@pytest.mark.parametrize("flags", [[], ["--polygons"]])
def test_pycocotools_loads_and_decodes_coco(tmp_path, labels, capsys, flags):
    export(capsys, labels, "coco", tmp_path / "out.json", *flags)
    known = COCO(str(tmp_path / "out.json"))
    assert [known.loadCats(i)[0]["name"] for i in known.getCatIds()] == ["leaf", "stem"]
    for image in known.loadImgs(known.getImgIds()):
        mask = MASKS[image["file_name"].removesuffix(".jpg")]
        assert (image["height"], image["width"]) == mask.shape
        found = np.zeros(mask.shape, np.uint8)
        for one in known.loadAnns(known.getAnnIds(imgIds=image["id"])):
            pixels = known.annToMask(one).astype(bool)
            assert one["area"] == pixels.sum() and not found[pixels].any()
            rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            x, y = int(columns[0]), int(rows[0])
            assert one["bbox"] == [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
            found[pixels] = one["category_id"]
        assert (found == without_ignored(mask)).all()


def decoded(values: list[int]) -> np.ndarray:
    """Decodes a brush of Label Studio by its format: runs of 8-bit values, after a header with their
    number."""
    bits = np.unpackbits(np.array(values, np.uint8)).tolist()
    at = 0

    def number(count: int) -> int:
        nonlocal at
        at += count
        return int("".join(map(str, bits[at - count : at])), 2)

    total, width = number(32), number(5) + 1
    widths = [number(4) + 1 for _ in range(4)]
    out = []
    while len(out) < total:
        is_run = number(1)
        length = number(widths[number(2)]) + 1
        out += [number(width)] * length if is_run else [number(width) for _ in range(length)]
    assert len(out) == total and at <= len(bits) < at + 8
    return np.array(out, np.uint8)


@RELAXED
@given(cases.masks(ids=(0, 1)))
def test_brushes_follow_their_format(mask):
    found = decoded(runs.brush(mask == 1)).reshape(*mask.shape, 4)
    assert (found == np.where(mask == 1, 255, 0)[..., None]).all()


def test_long_run_of_a_brush_is_split():
    mask = np.zeros((300, 300), bool)
    mask[20:290] = True
    assert (decoded(runs.brush(mask)).reshape(300, 300, 4)[..., 3] == mask * 255).all()


def test_label_studio_gets_one_region_per_class(tmp_path, labels, capsys):
    export(capsys, labels, "label-studio", tmp_path / "one.json", "--image-prefix", "s3://bucket/")
    tasks = json.loads((tmp_path / "one.json").read_text())
    assert len(tasks) == 6
    for task in tasks:
        name = task["data"]["image"]
        assert name.startswith("s3://bucket/") and " " not in name
        mask = MASKS[name.removeprefix("s3://bucket/").replace("%20", " ").removesuffix(".jpg")]
        (prediction,) = task["predictions"]
        assert prediction["score"] == 0.875
        regions = {one["value"]["brushlabels"][0]: one for one in prediction["result"]}
        assert list(regions) == ["leaf", "stem"] and len({one["id"] for one in regions.values()}) == 2
        for class_id, name in enumerate(cases.NAMES):
            if name in regions:
                one = regions[name]
                assert (one["original_height"], one["original_width"]) == mask.shape
                assert (one["type"], one["from_name"], one["to_name"]) == ("brushlabels", "label", "image")
                found = decoded(one["value"]["rle"]).reshape(*mask.shape, 4)[..., 3]
                assert (found == (mask == class_id) * 255).all()


def test_many_tasks_are_several_files_with_the_labelling_setup(tmp_path, labels, capsys, monkeypatch):
    monkeypatch.setattr("stpp.annotations.to_label_studio.PART_BYTES", 1500)
    export(capsys, labels, "label-studio", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files[0] == "label-config.xml" and len(files) > 3
    tasks = [one for name in files[1:] for one in json.loads((tmp_path / "out" / name).read_text())]
    assert [one["data"]["image"] for one in tasks] == sorted(
        f"/data/local-files/?d={key.replace(' ', '%20')}.jpg" for key in MASKS
    ) or len(tasks) == 6
    config = (tmp_path / "out" / "label-config.xml").read_text()
    assert '<BrushLabels name="label" toName="image">' in config and '<Label value="leaf"/>' in config


INSTALLED = (READERS.parents[1] / ".installed").exists()
needs_readers = pytest.mark.skipif(
    not INSTALLED, reason="the tools' own readers are not installed: make readers"
)


def read_elsewhere(out: Path, *args: object) -> dict[str, np.ndarray]:
    """Reads masks by their names with a tool's own reader."""
    command = [READERS, "-W", "ignore", ROOT / "tests" / "tool_readers.py", *args, out]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as found:
        return {key: found[f"m{i}"] for i, key in enumerate(found["keys"].tolist())}


@needs_readers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "flags", "kind"),
    [
        ("cvat", [], "voc_segmentation"),
        ("coco", [], "coco_instances"),
        ("coco", ["--polygons"], "coco_instances"),
    ],
)
def test_datumaro_imports_cvat_and_coco(tmp_path, labels, capsys, form, flags, kind):
    source = tmp_path / "out"
    if form == "coco":
        (source / "annotations").mkdir(parents=True)
        cases.data_set(source / "images" / "default", MASKS)
        export(capsys, labels, form, source / "annotations" / "instances_default.json", *flags)
    else:
        export(capsys, labels, form, source)
    found = read_elsewhere(tmp_path / "found.npz", "datumaro", source, kind)
    meant = {"background": 0, "leaf": 1, "stem": 2, "ignore": 255}
    class_ids = np.array([0, *(meant[name] for name in found.pop("names").tolist())])
    assert sorted(found) == sorted(MASKS)
    for key, mask in MASKS.items():
        assert (class_ids[found[key]] == (mask if form == "cvat" else without_ignored(mask))).all(), key


@needs_readers
@pytest.mark.slow
def test_label_studios_converter_decodes_the_brushes(tmp_path, labels, capsys):
    export(capsys, labels, "label-studio", tmp_path / "one.json", "--image-prefix", "")
    found = read_elsewhere(tmp_path / "found.npz", "label-studio", tmp_path / "one.json")
    assert len(found) == sum(len(set(np.unique(mask)) & {1, 2}) for mask in MASKS.values())
    for key, brush in found.items():
        image, name = key.split("::")
        mask = MASKS[image.replace("%20", " ").removesuffix(".jpg")]
        assert (brush == (mask == cases.NAMES.index(name)) * 255).all()


# --- CVAT's folder


def test_cvat_folder(tmp_path, labels, capsys):
    export(capsys, labels, "cvat", tmp_path / "out")
    assert (tmp_path / "out" / "labelmap.txt").read_text().splitlines() == [
        "# label:color_rgb:parts:actions",
        "background:0,0,0::",
        "leaf:128,0,0::",
        "stem:0,128,0::",
        "ignore:224,224,192::",
    ]
    lines = (tmp_path / "out" / "ImageSets" / "Segmentation" / "default.txt").read_text().splitlines()
    assert sorted(lines) == sorted(MASKS)
    for key, mask in MASKS.items():
        objects = np.asarray(Image.open(tmp_path / "out" / "SegmentationObject" / f"{key}.png")).astype(int)
        numbers = objects @ (65536, 256, 1)
        assert ((numbers > 0) == (mask > 0)).all()
        for number in np.unique(numbers[numbers > 0]):
            assert len(np.unique(mask[numbers == number])) == 1  # an object is of one class


def test_more_objects_than_cvat_numbers(tmp_path, capsys):
    mask = np.zeros((60, 60), np.uint8)
    mask[::2, ::2], mask[1::4, 1::2] = 1, 2
    mask[40:50, 40:50] = 1
    export(capsys, cases.labels(tmp_path / "labels", {"0": mask}), "cvat", tmp_path / "out")
    objects = np.asarray(Image.open(tmp_path / "out" / "SegmentationObject" / "0.png"))
    colours = np.unique(objects.reshape(-1, 3), axis=0)
    known = {tuple(one) for one in voc_colours(np.arange(256)).tolist()}
    assert len(colours) == 256 and {tuple(one) for one in colours.tolist()} <= known
    large = {tuple(one) for one in objects[40:50, 40:50].reshape(-1, 3).tolist()}
    assert len(large) == 1 and not (objects[:38, :38] == list(large)[0]).all(-1).any()
    again = cases.data_set(tmp_path / "data", {"0": mask}, "JPEGImages")
    shutil.copytree(tmp_path / "out", again, dirs_exist_ok=True)
    assert (drawn(prepare(again), "JPEGImages/0.jpg") == mask).all()


def test_colours_are_those_of_voc():
    assert voc_colours(np.array([0, 1, 2, 3, 8, 21, 255])).tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [64, 0, 0],
        [128, 64, 128],
        [224, 224, 192],
    ]
    assert len(np.unique(voc_colours(np.arange(256)), axis=0)) == 256


# --- input and refusals


@pytest.mark.parametrize(("form", "out"), KINDS)
def test_archives_and_several_processes_give_the_same_bytes(tmp_path, labels, capsys, form, out):
    tar = cases.labels(tmp_path / "tar", MASKS, tar=True)
    outs = []
    for source, workers, name in ((labels, 1, "one"), (tar, 1, "two"), (labels, 2, "three")):
        (tmp_path / name).mkdir()
        code, _, errors = ended(
            capsys,
            "export-labels",
            source,
            "--format",
            form,
            "--out",
            tmp_path / name / out,
            "--workers",
            workers,
        )
        assert code == 0, errors
        outs.append(
            {
                str(path.relative_to(tmp_path / name)): path.read_bytes()
                for path in (tmp_path / name).rglob("*")
                if path.is_file()
            }
        )
    assert outs[0] == outs[1] == outs[2] and outs[0]
    if out.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(outs[0]["out.zip"])) as archive:
            assert archive.testzip() is None and "SegmentationClass/a/image 0.png" in archive.namelist()


def test_only_ticked_images_are_written(tmp_path, labels, capsys):
    keys = list(MASKS)
    (tmp_path / "ticked.txt").write_text(f"{keys[1]}\n{keys[4]}.jpg\n")
    assert "2 images" in export(capsys, labels, "cvat", tmp_path / "out", "--only", tmp_path / "ticked.txt")
    lines = (tmp_path / "out" / "ImageSets" / "Segmentation" / "default.txt").read_text().splitlines()
    assert sorted(lines) == sorted([keys[1], keys[4]])
    (tmp_path / "ticked.txt").write_text(f"{keys[1]}\nnowhere\nbad\n")
    command = [
        "export-labels",
        labels,
        "--format",
        "cvat",
        "--out",
        tmp_path / "other",
        "--workers",
        "1",
        "--only",
    ]
    assert "2 lines name no labelled image, the first: 'bad'" in refused(
        capsys, *command, tmp_path / "ticked.txt"
    )
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".other*"))
    (tmp_path / "ticked.txt").write_text("\n")
    assert "lists no image" in refused(capsys, *command, tmp_path / "ticked.txt")


@pytest.mark.parametrize("form", ["cvat", "coco", "yolo", "label-studio"])
def test_small_objects_are_left_out(tmp_path, capsys, form):
    mask = np.zeros((12, 12), np.uint8)
    mask[2:6, 2:6], mask[9, 9], mask[8, 2:4] = 1, 1, 2
    out = tmp_path / ("out.json" if form in ("coco", "label-studio") else "out")
    export(capsys, cases.labels(tmp_path / "labels", {"0": mask}), form, out, "--min-area", 3)
    expected = np.where(mask == 1, 1, 0)
    expected[9, 9] = 0
    if form == "cvat":  # unknown, not background
        expected[9, 9] = expected[8, 2:4] = 255
    if form == "label-studio":
        (one,) = json.loads(out.read_text())[0]["predictions"][0]["result"]
        assert (decoded(one["value"]["rle"]).reshape(12, 12, 4)[..., 3] == expected * 255).all()
        return
    made = in_again(
        tmp_path / "data", form, out, {"0": mask}, **{} if form == "cvat" else {"unlisted": "background"}
    )
    assert (drawn(made, next(iter(made.entries))) == expected).all()


def test_small_ignored_parts_stay_ignored(tmp_path, capsys):
    mask = np.zeros((12, 12), np.uint8)
    mask[2:4, 2:4], mask[6:11, 6:11] = 255, 1
    export(capsys, cases.labels(tmp_path / "labels", {"0": mask}), "cvat", tmp_path / "out", "--min-area", 9)
    made = in_again(tmp_path / "data", "cvat", tmp_path / "out", {"0": mask})
    assert (drawn(made, next(iter(made.entries))) == mask).all()


def test_mask_that_another_program_changed_is_refused(tmp_path, capsys):
    """Its palette or bits may mean other ids."""
    labels = cases.labels(tmp_path / "labels", {"0": np.eye(12, dtype=np.uint8)})
    path = labels / "masks" / "0.png"
    for mode in ("P", "1"):
        Image.open(path).convert(mode).save(path)
        said = refused(capsys, "export-labels", labels, "--format", "coco", "--workers", "1", "--out",
                       tmp_path / "a.json")
        assert f"0.png: a mask is not the 8-bit gray PNG that was written ({mode})" in said
        Image.fromarray(np.eye(12, dtype=np.uint8)).save(path)


@pytest.mark.parametrize("turn", range(1, 9))
def test_masks_of_images_labelled_as_stored_are_exported_upright(tmp_path, capsys, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    source = label_cases.as_folder(tmp_path / "in", {
        "a.jpg": label_cases.encoded(label_cases.picture(5, (40, 56)), exif=exif)})
    outs = {}
    for name, rule in (("upright", True), ("stored", False)):
        label_cases.run(source, tmp_path / name, exif=rule, classes=("background", "b", "c", "d"), tta="none")
        export(capsys, tmp_path / name, "cvat", tmp_path / f"{name}.cvat")
        outs[name] = np.asarray(Image.open(tmp_path / f"{name}.cvat" / "SegmentationClass" / "a.png"))
    mask = Image.open(tmp_path / "stored" / "masks" / "a.png").convert("RGB")
    numbers = read_index_mask(tmp_path / "stored" / "masks" / "a.png")
    mask.getexif()[0x0112] = turn
    assert outs["stored"].shape == outs["upright"].shape
    background = np.asarray(ImageOps.exif_transpose(mask))[..., 0] == 0
    assert numbers.any() and np.array_equal((outs["stored"] == 0).all(2), background)
    (source / "a.jpg").unlink()
    assert "an export needs its EXIF orientation" in refused(
        capsys, "export-labels", tmp_path / "stored", "--format", "cvat", "--workers", "1", "--out",
        tmp_path / "again")


def test_class_names_are_required(tmp_path, capsys):
    labels = cases.labels(tmp_path / "labels", MASKS, classes=())
    command = ["export-labels", labels, "--format", "coco", "--workers", "1", "--out"]
    assert "the class names are unknown; give --classes" in refused(
        capsys, *command, tmp_path / "a.json"
    )
    assert ended(capsys, *command, tmp_path / "a.json", "--classes", "a", "b", "c")[0] == 0
    assert "holds the class id 2, and there are 2 classes" in refused(
        capsys, *command, tmp_path / "b.json", "--classes", "a", "b"
    )
    of_three = cases.labels(tmp_path / "of three", MASKS, classes=("sky", "road", "car"))
    assert "--classes: got 2 names, and the network that labelled" in refused(
        capsys, "export-labels", of_three, *command[2:], tmp_path / "b.json", "--classes", "a", "b")
    run = tmp_path / "run"
    (run / "stages" / "3-label").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "provenance.json").write_text(json.dumps({"classes": ["sky", "road", "car"]}))
    shutil.copytree(labels, run / "stages" / "3-label", dirs_exist_ok=True)
    export(capsys, run / "stages" / "3-label", "coco", tmp_path / "c.json")
    assert [one["name"] for one in json.loads((tmp_path / "c.json").read_text())["categories"]] == [
        "sky",
        "road",
        "car",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--format", "coco", "--out", "x"], "a COCO file must end in .json"),
        (["--format", "cvat", "--out", "x", "--polygons"], "--polygons: needs --format coco"),
        (
            ["--format", "cvat", "--out", "x", "--image-prefix", "y"],
            "--image-prefix: needs --format label-studio",
        ),
        (["--format", "cvat", "--out", "x", "--min-area", "-1"], "--min-area is -1"),
        (
            ["--format", "cvat", "--out", "x", "--classes", "a", "b:c", "d"],
            "cvat cannot store the name 'b:c'",
        ),
        (
            ["--format", "yolo", "--out", "x", "--classes", "a", "b", "b"],
            "expected up to 254 distinct names, got 3",
        ),
        (["--format", "cvat", "--out", "."], "already exists"),
        (["--format", "cvat", "--out", "x", "--only", "nowhere"], "cannot be read as a list"),
        (["--format", "cvat", "--out", "x", "--run", "nowhere"], "not a run that records its classes"),
        (["--format", "nothing", "--out", "x"], "--format"),
    ],
)
def test_impossible_flags_are_refused(tmp_path, labels, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, "export-labels", labels, *flags)
    assert list(tmp_path.iterdir()) == []


def test_damaged_labels_are_named_and_leave_no_output(tmp_path, capsys):
    labels = cases.labels(tmp_path / "labels", MASKS)
    command = ["export-labels", labels, "--format", "cvat", "--workers", "1", "--out", tmp_path / "out"]
    key = next(iter(MASKS))
    mask = labels / "masks" / f"{key}.png"
    held = mask.read_bytes()
    mask.write_bytes(held[:40])
    assert "a mask cannot be read" in refused(capsys, *command)
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(mask)
    assert "has 4x3 pixels, but its row says 35x24" in refused(capsys, *command)
    mask.unlink()
    assert "a mask cannot be read (FileNotFoundError)" in refused(capsys, *command)
    mask.write_bytes(held)
    tar = cases.labels(tmp_path / "tar", MASKS, tar=True)
    (tar / "masks" / "shard-000000.tar").write_bytes(b"x" * 99)
    assert "incomplete tar archive" in refused(capsys, "export-labels", tar, *command[2:])
    assert "holds no labels" in refused(capsys, "export-labels", tmp_path, *command[2:])
    assert "no such folder" in refused(capsys, "export-labels", tmp_path / "gone", *command[2:])
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("key", ["../outside", "/etc/outside", "a/../../outside", "a\nb"])
def test_keys_that_lead_outside_are_refused(tmp_path, capsys, key):
    labels = cases.labels(tmp_path / "labels", {"0": MASKS["a/image 0"]})
    from stpp.label import rows

    table = rows.read(rows.part(labels, "labels", 0))
    rows.write(rows.part(labels, "labels", 0), [table[0] | {"key": key}], rows.LABELS)
    said = refused(
        capsys, "export-labels", labels, "--format", "cvat", "--workers", "1", "--out", tmp_path / "x" / "out"
    )
    assert "is damaged" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(labels)]


@pytest.mark.parametrize("output", ["png", "tar"])
def test_labels_of_a_teacher_know_its_classes(tmp_path, capsys, output):
    """From `stpp label`, with odd names of images, and low confidence ignored."""
    files = dict(list(label_cases.good_files().items())[:4]) | {
        "ünï – 火 'x' & y.jpg": label_cases.encoded(label_cases.picture(9))
    }
    source = label_cases.as_folder(tmp_path / "in", files)
    label_cases.run(
        source, tmp_path / "labels", output=output, classes=("sky", "road", "tree", "car"), min_confidence=0.7
    )
    said = export(capsys, tmp_path / "labels", "cvat", tmp_path / "out")
    assert "5 images" in said and "unfinished" not in said
    shutil.copytree(source, tmp_path / "out" / "JPEGImages")
    made = prepare(tmp_path / "out", classes=("sky", "road", "tree", "car"))
    label_cases.run(source, tmp_path / "plain", min_confidence=0.7)
    for name in files:
        assert (
            drawn(made, f"JPEGImages/{name}")
            == read_index_mask((tmp_path / "plain" / "masks" / name).with_suffix(".png"))
        ).all()
    export(capsys, tmp_path / "labels", "yolo", tmp_path / "yolo")
    assert class_files.from_tools(tmp_path / "yolo")[0] == ["sky", "road", "tree", "car"]


def test_names_of_the_labelling_network_come_before_those_of_the_run_around_it(tmp_path, capsys):
    """The labels of another network may lie in a run's folder, in which classes have another order."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "provenance.json").write_text(json.dumps({"classes": ["stem", "leaf", "background"]}))
    (run / "config.json").write_text("{}")
    (run / "stages").mkdir()
    labels = cases.labels(run / "labels", {"0": np.ones((24, 32), np.uint8)})
    assert report_run.of_labels(labels) == run and report_run.classes(run) == ["stem", "leaf", "background"]
    export(capsys, labels, "coco", tmp_path / "out.json")
    names = {each["id"]: each["name"] for each in
             json.loads((tmp_path / "out.json").read_text())["categories"]}
    used = {each["category_id"] for each in json.loads((tmp_path / "out.json").read_text())["annotations"]}
    assert {names[number] for number in used} == {"leaf"}
    code, _, said = ended(capsys, "export-labels", str(labels), "--format", "coco", "--out",
                          str(tmp_path / "b.json"), "--run", str(run))
    assert code == 2 and "its classes differ from those of the network that labelled" in said
