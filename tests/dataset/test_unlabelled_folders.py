"""Unlabelled images in folders outside the data root."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from stpp import cli, config
from stpp.config import Config, DataConfig
from stpp.dataset import index, layouts, splits
from stpp.distributed import World
from stpp.errors import UserError
from stpp.run import folder
from stpp.run.run import Run

CLASSES = ("ground", "thing")


def picture(path: Path, mode: str = "RGB", value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), value if mode == "L" else (value,) * 3).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """Writes four labelled images."""
    for i in range(4):
        picture(tmp_path / "data" / "images" / f"{i}.jpg")
        picture(tmp_path / "data" / "masks" / f"{i}.png", "L", i % 2)
    return tmp_path / "data"


@pytest.fixture
def field(tmp_path) -> Path:
    """Writes images in folders whose names have a meaning below a data root."""
    for name in ("train/a b.jpg", "val/é.JPG", "test/2.png", "0.jpg"):
        picture(tmp_path / "big" / "field" / name)
    return tmp_path / "big" / "field"


def prepare(root: Path, out: Path, *unlabelled: Path) -> index.Index:
    return index.prepare(root, out, classes=CLASSES, unlabelled=unlabelled, progress=False)


def test_images_are_named_by_folder_and_root_images_unchanged(root, field, tmp_path):
    alone = dict(prepare(root, tmp_path / "alone").entries)
    made = prepare(root, tmp_path / "index", field)
    assert {image: made.entries[image] for image in alone} == alone
    names = ["field/0.jpg", "field/test/2.png", "field/train/a b.jpg", "field/val/é.JPG"]
    assert list(made.entries) == [*alone, *names] and made.counts == {"images": 8, "masks": 4, "converted": 0}
    sample = made.sample("field/train/a b.jpg")
    assert (sample.key, sample.image, sample.mask) == ("field/train/a b", str(field / "train" / "a b.jpg"),
                                                       None)
    assert dict(index.load(tmp_path / "index").entries) == dict(made.entries)


def test_single_root_keeps_its_fingerprint_and_files(root, tmp_path):
    stored = json.loads((prepare(root, tmp_path / "index").out / "index.json").read_text())
    assert set(stored["settings"]) == {"layout", "images", "masks", "classes", "mask_map", "exif"}


def test_all_images_are_unlabelled_whatever_their_folders(root, field, tmp_path):
    made = prepare(root, tmp_path / "index", field)
    splits.make_split(made, tmp_path / "split", fraction="1/2")
    assert [len((tmp_path / "split" / f"{name}.txt").read_text().splitlines())
            for name in ("labeled", "unlabeled")] == [2, 6]
    assert not (tmp_path / "split" / "val.txt").exists()
    samples = splits.read_split(tmp_path / "split" / "unlabeled.txt", made, labelled=False)
    assert {sample.image for sample in samples} >= {str(path) for path in field.rglob("*") if path.is_file()}


def test_index_is_stale_when_their_files_change(root, field, tmp_path):
    options = {"classes": CLASSES, "unlabelled": [field]}
    prepare(root, tmp_path / "index", field)
    assert not index.is_stale(tmp_path / "index", root, **options)
    assert index.is_stale(tmp_path / "index", root, classes=CLASSES)
    picture(field / "new.jpg")
    assert index.is_stale(tmp_path / "index", root, **options)


def test_a_broken_image_is_named_as_in_lists(root, field, tmp_path):
    (field / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r": field/broken\.jpg: cannot be read as an image"):
        prepare(root, tmp_path / "index", field)


def test_unusable_folders_are_refused_with_their_name(root, field, tmp_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "index"

    def refused(match: str, *folders: Path) -> None:
        with pytest.raises(UserError, match=f"--data.unlabelled .*{match}") as error:
            prepare(root, out, *folders)
        assert "\n" not in str(error.value)

    refused("does not exist", tmp_path / "nowhere")
    refused("is not a folder", field / "0.jpg")
    (tmp_path / "empty").mkdir()
    refused("no image found", tmp_path / "empty")
    refused("contains .* of --data.root", root)
    refused("contains .* of --data.root", tmp_path)
    refused("contains masks/0.png of", root / "masks")
    refused("contain the same images", field, field / "val")
    other = picture(tmp_path / "other" / "field" / "0.jpg").parent
    refused("both are called field", field, other)
    taken = picture(tmp_path / "other" / "images" / "0.jpg").parent
    refused("as does images/0.jpg of .*; give a link", taken)
    (tmp_path / "renamed").symlink_to(taken)
    made = prepare(root, out, tmp_path / "renamed")
    assert made.sample("renamed/0.jpg").image == str(tmp_path / "renamed" / "0.jpg")
    with pytest.raises(UserError, match="the index must not be among"):
        prepare(root, field / "index", field)
    assert prepare(root, out, picture(root / "more" / "0.jpg").parent).sample("more/0.jpg")


def test_damaged_list_of_folders_is_refused(root, field, tmp_path):
    path = prepare(root, tmp_path / "index", field).out / "index.json"
    good = path.read_text()
    for bad in ('"field"', '["field"]', "[1]"):
        path.write_text(good.replace(json.dumps([str(field)], indent=2).replace("\n", "\n    "), bad))
        assert bad in path.read_text()
        with pytest.raises(UserError, match="not an index"):
            index.load(path.parent)


def test_st_trains_on_them(root, field, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f"""
        method = "st"
        device = "cpu"
        data.root = "{root}"
        data.unlabelled = ["{field}"]
        data.classes = ["ground", "thing"]
        data.fraction = "1/1"
        data.threads = 1
        model = {{ backbone = "resnet18", output_stride = 32 }}
        augment = {{ crop_px = 33, long_side = [32, 64] }}
        train = {{ epochs = 1, batch_global = 2, precision = "fp32" }}
        label = {{ tta = "none", backend = "eager" }}
    """)
    threads = torch.get_num_threads()
    try:
        cli.main(["train", "--recipe", str(recipe), "--out", str(tmp_path / "run")])
    finally:
        torch.set_num_threads(threads)
    masks = tmp_path / "run" / "stages" / "2-label" / "masks"
    assert sorted(str(path.relative_to(masks)) for path in masks.rglob("*.png")) == [
        "field/0.png", "field/test/2.png", "field/train/a b.png", "field/val/é.png"]


def test_list_that_omits_them_is_reported(root, field, tmp_path, capsys):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "labeled.txt").write_text("images/0.jpg masks/0.png\n")
    made = prepare(root, tmp_path / "index", field)
    for text, warned in (("images/2.jpg\n", True), ("field/0.jpg\n", False)):
        (lists / "unlabeled.txt").write_text(text)
        Run(Config(out=tmp_path / "run", data=DataConfig(split=lists)), World(device=torch.device("cpu")),
            made)
        assert ("names no image of --data.unlabelled" in capsys.readouterr().err) == warned


def test_run_started_before_a_setting_existed_resumes(tmp_path):
    ours = Config(out=tmp_path)
    (tmp_path / "stages" / "1-supervised").mkdir(parents=True)
    (tmp_path / "stages" / "1-supervised" / "last.pt").touch()
    began = config.to_dict(ours)
    del began["data"]["view_px"]
    (tmp_path / "config.json").write_text(json.dumps(began))
    folder.claim(ours)
    with pytest.raises(UserError, match="data.view_px"):
        folder.claim(config.parse(Config, ["--out", str(tmp_path), "--data.view-px", "480"],
                                  prog="stpp train"))


# --- several labelled folders below one root


@pytest.mark.parametrize(("images", "masks", "pairs"), [
    ("*/photos/**/*", "*/labels/**/*.png", {"a/photos/1", "a/photos/x/1", "b/photos/1"}),
    ("*/photos/**/*.jpg", "*/labels/**/*_mask.png", {"b/photos/2"}),
    ("**/photos/*", "**/labels/*.png", {"a/photos/1", "b/photos/1", "c/d/photos/1"}),
    ("*/photos/*/*", "*/labels/*/*.png", {"a/photos/x/1"}),
    ("photos/**/*", "labels/*/same/*.png", {"photos/e/same/1"}),
])
def test_sets_of_several_folders_pair_within_each(tmp_path, images, masks, pairs):
    for name in ("a/photos/1.jpg", "a/photos/x/1.JPG", "b/photos/1.jpg", "b/photos/2.jpg", "c/d/photos/1.jpg",
                 "a/photos/lone.jpg",
                 "photos/e/same/1.jpg"):
        picture(tmp_path / name)
        if "lone" not in name:
            mask = name.replace("photos",
                                "labels").rpartition(".")[0] + ("_mask.png" if "2" in name else ".png")
            picture(tmp_path / mask, "L", 1)
    found = layouts.find(tmp_path, "globs", images, masks)
    assert {one.key for one in found if one.mask} == pairs
    for one in found:
        if one.mask:
            assert one.mask.replace("labels", "photos").removesuffix(".png").removesuffix("_mask") == one.key


def test_folders_around_a_fixed_one_form_two_names(tmp_path):
    picture(tmp_path / "x" / "photos" / "y" / "1.jpg")
    picture(tmp_path / "x" / "y" / "photos" / "1.jpg")
    picture(tmp_path / "x" / "labels" / "y" / "1.png", "L")
    found = layouts.find(tmp_path, "globs", "**/photos/**/*", "**/labels/**/*.png")
    assert [(one.key, one.mask) for one in found] == [("x/photos/y/1", "x/labels/y/1.png"),
                                                      ("x/y/photos/1", None)]
