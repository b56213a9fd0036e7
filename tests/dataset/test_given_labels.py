"""Pseudo labels from a folder: discovery, checks and refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stpp import config
from stpp.config import Config
from stpp.dataset import given_labels, index, splits
from stpp.errors import UserError
from stpp.images.masks import read_index_mask


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> index.Index:
    """Two labelled images and four unlabelled ones, of 6x4 pixels, three classes."""
    root = tmp_path_factory.mktemp("given") / "data"
    for i in range(6):
        image = root / "photos" / f"town {i % 2}" / f"{i}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(image)
        if i < 2:
            mask = root / "labels" / f"town {i % 2}" / f"{i}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (6, 4), 1).save(mask)
    return index.prepare(root, root.parent / "index", images="photos/**/*.jpg", masks="labels/**/*.png",
                         classes=("a", "b", "c"), progress=False)


@pytest.fixture
def unlabelled(known):
    return [known.sample(image) for image in known.entries if known.entries[image].mask is None]


def written(folder: Path, *keys: str, value: int = 2, size: tuple[int, int] = (6, 4),
            mode: str = "L") -> Path:
    for key in keys:
        path = folder / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new(mode, size, value)
        if mode == "P":
            image.putpalette(list(range(256)) * 3)  # without one Pillow stores a single bit
        image.save(path)
    return folder


@pytest.mark.parametrize(("below", "prefix"),
                         [("masks", "photos/"), (".", "photos/"), ("masks", ""), (".", "")])
def test_masks_are_found_in_the_folders_of_label_and_runs(known, unlabelled, tmp_path, below, prefix):
    folder, out = tmp_path / "labelled", tmp_path / "out"
    written(folder / below, f"{prefix}town 0/2", f"{prefix}town 1/5")
    given_labels.check(unlabelled, folder, known, out)
    found = given_labels.attach(unlabelled, out)
    assert [(sample.key, sample.strong)
            for sample in found] == [("photos/town 0/2", True), ("photos/town 1/5", True)]
    assert all(read_index_mask(sample.mask)[0, 0] == 2 for sample in found)


def test_corrected_masks_may_have_a_palette(known, unlabelled, tmp_path):
    written(tmp_path / "in", "town 0/2", mode="P")
    given_labels.check(unlabelled, tmp_path / "in", known, tmp_path / "out")
    (sample,) = given_labels.attach(unlabelled, tmp_path / "out")
    assert sample.mask == str(tmp_path / "out" / "masks" / "photos" / "town 0" / "2.png")
    with Image.open(sample.mask) as file:
        assert file.mode == "L" and np.asarray(file).tolist() == [[2] * 6] * 4


def test_excluded_images_are_left_out(known, unlabelled, tmp_path):
    written(tmp_path / "in", "town 0/2", "town 0/4")
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("photos/town 0/4.jpg\n")
    given_labels.check(unlabelled, tmp_path / "in", known, tmp_path / "out", exclude=exclude)
    assert [sample.key for sample in given_labels.attach(unlabelled, tmp_path / "out")] == ["photos/town 0/2"]
    exclude.write_text("photos/gone.jpg\n")
    with pytest.raises(UserError, match=r"exclude\.txt, line 1: photos/gone\.jpg"):
        given_labels.check(unlabelled, tmp_path / "in", known, tmp_path / "out", exclude=exclude)
    with pytest.raises(ValueError, match="--exclude is"):
        Config(exclude=exclude)
    with pytest.raises(UserError, match="--exclude is"):
        config.parse(Config, ["--exclude", str(exclude)], prog="stpp train")


@pytest.mark.parametrize(("options", "said"), [
    ({"value": 7}, "2.png: class id 7 in 24 pixels"),
    ({"size": (5, 4)}, "2.png: the mask has 5x4 pixels, but its image .* 6x4"),
    ({"value": (1, 2, 3), "mode": "RGB"}, "2.png: the mask holds colours"),
])
def test_bad_masks_are_named(known, unlabelled, tmp_path, options, said):
    written(tmp_path / "in", "town 0/2", "town 1/3", **options)
    with pytest.raises(UserError, match=said) as refused:
        given_labels.check(unlabelled, tmp_path / "in", known, tmp_path / "out")
    assert str(tmp_path / "in") in str(refused.value) and "1 more mask" in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "out" / given_labels.NAME).exists()


def test_folders_without_masks_are_named(known, unlabelled, tmp_path):
    (tmp_path / "in").mkdir()
    for name, said in (("absent", "absent: no such folder"),
                       ("in", "in: contains no mask of an unlabelled image")):
        with pytest.raises(UserError, match=said):
            given_labels.check(unlabelled, tmp_path / name, known, tmp_path / "out")


def test_masks_shared_by_two_images_are_refused(tmp_path):
    root = tmp_path / "data"
    for folder in ("one", "two"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(root / folder / "a.jpg")
    made = index.prepare(root, tmp_path / "index", images="**/*.jpg", classes=("a", "b"), progress=False)
    samples = [made.sample(image) for image in made.entries]
    with pytest.raises(UserError, match="share a mask"):
        given_labels.check(samples, written(tmp_path / "in", "a", value=1), made, tmp_path / "out")


def test_masks_must_not_change_during_a_run(known, unlabelled, tmp_path):
    folder, out = written(tmp_path / "in", "town 0/2"), tmp_path / "out"
    given_labels.check(unlabelled, folder, known, out)
    given_labels.check(unlabelled, folder, known, out, began=True)
    written(folder, "town 1/3")
    with pytest.raises(UserError, match="changed since this run began"):
        given_labels.check(unlabelled, folder, known, out, began=True)
    (out / given_labels.NAME).write_text("{")
    with pytest.raises(UserError, match=r"given\.json: cannot be read"):
        given_labels.attach(unlabelled, out)


def test_split_lists_are_accepted_as_exclude(known, unlabelled, tmp_path):
    """`--exclude` reads the lists of a split."""
    splits.make_split(known, tmp_path / "split", fraction="1/1")
    assert len(splits.read_split(tmp_path / "split" / "unlabeled.txt", known,
                                 labelled=False)) == len(unlabelled) == 4


def test_corrected_cvat_masks_override_the_others(known, unlabelled, tmp_path):
    """An export of CVAT is unpacked into the folder of the labels."""
    folder = written(tmp_path / "in", "masks/photos/town 0/2", "masks/photos/town 0/4", value=2)
    colours = np.zeros((4, 6, 3), np.uint8)
    colours[:2], colours[2, 0] = (10, 20, 30), (224, 224, 192)
    path = folder / "SegmentationClass" / "photos" / "town 0" / "4.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(colours).save(path)
    (folder / "labelmap.txt").write_text("background:0,0,0::\nb:10,20,30::\nignore:224,224,192::\n")
    given_labels.check(unlabelled, folder, known, tmp_path / "out")
    attached = given_labels.attach(unlabelled, tmp_path / "out")
    found = {sample.key: read_index_mask(sample.mask) for sample in attached}
    assert (found.pop("photos/town 0/2") == 2).all()
    (mask,) = found.values()
    assert (mask[:2] == 1).all() and (mask[2:] == 255).all()  # no class is the background here
    # a tool writes the background in its own way
    renamed = dataclasses.replace(known, classes=("_Background_", "b", "c"))
    given_labels.check(unlabelled, folder, renamed, tmp_path / "renamed")
    found = {sample.key: sample.mask for sample in given_labels.attach(unlabelled, tmp_path / "renamed")}
    mask = read_index_mask(found["photos/town 0/4"])
    assert (mask[:2] == 1).all() and mask[2, 0] == 255 and (mask[3] == 0).all()
    (folder / "labelmap.txt").write_text("background:0,0,0::\ntree:10,20,30::\nignore:224,224,192::\n")
    with pytest.raises(UserError, match=r"labelmap\.txt: 'tree' is not a class"):
        given_labels.check(unlabelled, folder, known, tmp_path / "again")


@pytest.mark.parametrize("excluded", [False, True])
def test_mask_of_an_image_that_is_no_candidate_is_not_given_to_another(tmp_path, excluded):
    """Of `stpp label --source DATA/two`; two's images are labelled ones, or excluded."""
    root = tmp_path / "data"
    for folder in ("one", "two"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(root / folder / "a.jpg")
    made = index.prepare(root, tmp_path / "index", images="**/*.jpg", classes=("a", "b"), progress=False)
    samples = [made.sample(image) for image in (("one/a.jpg", "two/a.jpg") if excluded else ("one/a.jpg",))]
    exclude = tmp_path / "bad.txt" if excluded else None
    (tmp_path / "bad.txt").write_text("two/a.jpg\n")
    with pytest.raises(UserError, match=r"images of several folders share a mask, a\.png"):
        given_labels.check(samples, written(tmp_path / "in", "a", value=1), made, tmp_path / "out",
                           exclude=exclude)
