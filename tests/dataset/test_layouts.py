"""Cityscapes and VOC as published, with the lists of the public code, unchanged."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stpp import cli
from stpp.dataset import cityscapes, index, layouts, splits
from stpp.errors import UserError
from stpp.images.masks import read_index_mask

TRAINED = [("train", "aachen", i) for i in range(4)] + [("train", "ulm", 4), ("val", "bern", 5)]
BARE = [("test", "berlin", 6), ("train_extra", "augsburg", 7)]


def city(root: Path, ids: str, size: tuple[int, int] = (64, 32)) -> Path:
    """Writes a miniature of Cityscapes, with masks `labelTrainIds`, `labelIds`, or both."""
    rng = np.random.default_rng(0)
    for split, town, i in TRAINED + BARE:
        stem = f"{split}/{town}/{town}_{i:06d}_000019"
        image = root / "leftImg8bit" / f"{stem}_leftImg8bit.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(image)
        for kind, value in (("labelTrainIds", 13), ("labelIds", 26)):
            if (split, town, i) in TRAINED and kind in ids.split():
                mask = root / "gtFine" / f"{stem}_gtFine_{kind}.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                values = np.full(size[::-1], value, dtype=np.uint8)
                values[:4], values[4:8] = (
                    0 if kind == "labelTrainIds" else 7,
                    255 if kind == "labelTrainIds" else 4,
                )
                Image.fromarray(values).save(mask)
                Image.fromarray(values).save(mask.with_name(mask.name.replace(kind, "instanceIds")))
    return root


def line(split: str, town: str, i: int) -> str:
    """Returns a line of the public lists."""
    stem = f"{split}/{town}/{town}_{i:06d}_000019"
    return f"leftImg8bit/{stem}_leftImg8bit.png gtFine/{stem}_gtFine_labelTrainIds.png\n"


def public_lists(folder: Path) -> Path:
    """Writes `1_30/labeled.txt`, `1_30/unlabeled.txt`, and val.txt next to 1_30, as in UniMatch."""
    (folder / "1_30").mkdir(parents=True)
    (folder / "1_30" / "labeled.txt").write_text("".join(line(*one) for one in TRAINED[:3]))
    (folder / "1_30" / "unlabeled.txt").write_text("".join(line(*one) for one in TRAINED[3:5] + BARE[1:]))
    (folder / "val.txt").write_text(line(*TRAINED[5]))
    return folder / "1_30"


# --- Cityscapes


@pytest.mark.parametrize(("ids", "ending"), [
    ("labelTrainIds", "labelTrainIds"), ("labelIds", "labelIds"),
    ("labelTrainIds labelIds", "labelTrainIds")])
def test_cityscapes_is_found_and_mapped(tmp_path, ids, ending):
    root = city(tmp_path / "data", ids)
    made = index.prepare(root, tmp_path / "index", progress=False)
    assert (made.layout, made.classes) == ("cityscapes", cityscapes.CLASSES)
    assert made.counts == {"images": 8, "masks": 6, "converted": 6 if ending == "labelIds" else 0}
    image = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    assert made.entries[image].mask == f"gtFine/train/aachen/aachen_000000_000019_gtFine_{ending}.png"
    mask = read_index_mask(made.sample(image).mask)
    assert [mask[row, 0] for row in (0, 4, 8)] == [0, 255, 13]
    assert made.entries["leftImg8bit/test/berlin/berlin_000006_000019_leftImg8bit.png"].mask is None
    assert not index.is_stale(tmp_path / "index", root)


def test_incomplete_train_id_masks_are_skipped(tmp_path):
    """A script draws labelTrainIds from the original masks; its interruption must not cost labels."""
    root = city(tmp_path, "labelTrainIds labelIds")
    next((root / "gtFine").rglob("*_labelTrainIds.png")).unlink()
    assert layouts.own_masks(root, "cityscapes") == cityscapes.LABEL_IDS
    assert sum(one.mask is not None for one in layouts.find(root)) == 6


def test_masks_of_a_pattern_are_mapped_by_name(tmp_path):
    root = city(tmp_path / "data", "labelTrainIds labelIds")
    made = index.prepare(root, tmp_path / "index", masks=cityscapes.LABEL_IDS, progress=False)
    assert made.counts["converted"] == 6
    with pytest.raises(UserError, match="--data.images .* needs --data.layout globs, not cityscapes"):
        layouts.find(root, "cityscapes", "a/*.png")


def test_unknown_cityscapes_id_names_the_file(tmp_path):
    root = city(tmp_path / "data", "labelIds")
    path = next((root / "gtFine").rglob("ulm*_labelIds.png"))
    Image.fromarray(np.full((32, 64), 40, dtype=np.uint8)).save(path)
    with pytest.raises(UserError, match=r"ulm_000004_000019_gtFine_labelIds\.png: id 40 in 2048 pixels"):
        index.prepare(root, tmp_path / "index", progress=False)


def test_drawn_split_excludes_val_and_test(tmp_path):
    made = index.prepare(city(tmp_path / "data", "labelIds"), tmp_path / "index", progress=False)
    splits.make_split(made, tmp_path / "split", fraction="2")
    drawn = {path.stem: path.read_text().splitlines() for path in (tmp_path / "split").iterdir()}
    assert {name: len(lines) for name, lines in drawn.items()} == {"labeled": 2, "unlabeled": 4, "val": 1}
    assert all("/train/" in text or "/train_extra/" in text for name in ("labeled", "unlabeled")
               for text in drawn[name])


@pytest.mark.parametrize("ids", ["labelTrainIds", "labelIds"])
def test_public_lists_of_cityscapes_load_unchanged(tmp_path, ids, capsys):
    made = index.prepare(city(tmp_path / "data", ids), tmp_path / "index", progress=False)
    capsys.readouterr()
    folder = public_lists(tmp_path / "partitions" / "cityscapes")
    assert len(splits.read_split(folder / "labeled.txt", made, labelled=True)) == 3
    unlabelled = splits.read_split(folder / "unlabeled.txt", made, labelled=False)
    assert [sample.mask is None for sample in unlabelled] == [False, False, True]
    # the image of train_extra, whose line names a missing mask
    assert capsys.readouterr().err.count("warning") == 1
    (val,) = splits.read_split(splits.find_val(folder), made, labelled=True)
    assert "/val/" in val.image


# --- VOC


def voc(root: Path, *, augmented: bool) -> Path:
    """Writes images 0 to 5, palette masks for 0 to 2, and, if augmented, masks of class ids for 0 to 4."""
    for folder in ("JPEGImages", "SegmentationClass", *["SegmentationClassAug"] * augmented):
        (root / folder).mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", (5, 4)).save(root / "JPEGImages" / f"2007_{i:06d}.jpg")
        if i < 3:
            palette = Image.new("P", (5, 4), 15)
            palette.putpalette([192, 128, 128] * 256)
            palette.save(root / "SegmentationClass" / f"2007_{i:06d}.png")
        if augmented and i < 5:
            Image.new("L", (5, 4), 15).save(root / "SegmentationClassAug" / f"2007_{i:06d}.png")
    return root


@pytest.mark.parametrize("augmented", [False, True])
def test_public_lists_of_voc_load_unchanged(tmp_path, augmented):
    made = index.prepare(voc(tmp_path / "data", augmented=augmented), tmp_path / "index", progress=False)
    assert made.counts == {"images": 6} | ({"masks": 5, "converted": 0} if augmented
                                           else {"masks": 3, "converted": 3})
    split = tmp_path / "splits" / "pascal" / "1_8" / "split_0"
    split.mkdir(parents=True)
    labelled = [f"2007_{i:06d}" for i in range(5 if augmented else 3)]
    (split / "labeled.txt").write_text("".join(f"JPEGImages/{name}.jpg "
                                               f"SegmentationClass/{name}.png\n" for name in labelled))
    samples = splits.read_split(split / "labeled.txt", made, labelled=True)
    assert [int(read_index_mask(sample.mask)[0, 0]) for sample in samples] == [15] * len(labelled)
    assert len(made.classes) == 21


def test_mask_of_another_image_is_refused(tmp_path):
    made = index.prepare(voc(tmp_path / "data", augmented=True), tmp_path / "index", progress=False)
    path = tmp_path / "labeled.txt"
    for mask in ("SegmentationClass/2007_000001.png", "SegmentationObject/2007_000000.png"):
        path.write_text(f"JPEGImages/2007_000000.jpg {mask}\n")
        with pytest.raises(UserError, match=r"labeled\.txt, line 1: .* is not the index's mask"):
            splits.read_split(path, made, labelled=True)


def test_palette_masks_can_be_selected(tmp_path):
    found = layouts.find(voc(tmp_path, augmented=True), "voc", masks="SegmentationClass/*.png")
    assert [one.mask for one in found][:4] == [f"SegmentationClass/2007_{i:06d}.png"
                                               for i in range(3)] + [None]


def test_validation_list_is_found_in_or_above_the_split(tmp_path):
    split = tmp_path / "pascal" / "1_8" / "split_0"
    split.mkdir(parents=True)
    assert splits.find_val(split) == split / "val.txt" and not splits.find_val(split).exists()
    for folder in (split.parent.parent, split.parent, split):
        (folder / "val.txt").touch()
        assert splits.find_val(split) == folder / "val.txt"
    assert splits.find_val(tmp_path) == tmp_path / "val.txt"


# --- a run


def test_st_runs_on_miniature_cityscapes_and_retrains_on_corrected_masks(tmp_path):
    root, split = city(tmp_path / "data", "labelIds"), public_lists(tmp_path / "partitions" / "cityscapes")
    recipe = Path(__file__).parents[2] / "launch" / "recipes" / "cityscapes.toml"
    small = ("--device cpu --model.backbone resnet18 --model.output-stride 16 --augment.crop-px 33 "
             "--augment.long-side 32 64 --train.epochs 1 --train.batch-global 2 --train.precision fp32 "
             "--label.tta none --label.backend eager --data.threads 1 --data.loader reference")
    train = ["train", "--recipe", str(recipe), "--method", "st", "--data.root", str(root), "--data.split",
             str(split),
             "--data.index", str(tmp_path / "index"), *small.split()]
    exclude = tmp_path / "exclude.txt"
    exclude.write_text(line(*BARE[1]))
    cli.main([*train, "--out", str(tmp_path / "run")])
    cli.main([*train, "--out", str(tmp_path / "again"), "--method", "retrain", "--pseudo-labels",
              str(tmp_path / "run" / "stages" / "2-label"),
              "--exclude", str(exclude)])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["1-supervised", "2-label", "3-retrain"]
    assert all(0 <= stage["miou"] <= 100 for stage in results["stages"] if stage["steps"])
    assert len(list((tmp_path / "run" / "stages" / "2-label" / "masks").rglob("*.png"))) == 3
    results = json.loads((tmp_path / "again" / "results.json").read_text())
    # 3 labels, as many as the remaining 2 masks need, and these: 5 entries in batches of 2.
    assert [(stage["name"], stage["steps"])
            for stage in results["stages"]] == [("1-retrain", 2)] and results["method"] == "retrain"
