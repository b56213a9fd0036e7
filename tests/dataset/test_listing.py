"""Lists of files: patterns, realistic folders, links, copies, official splits."""

import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dataset_cases import GLOBS, data_set, ids, photo, prepare
from stpp import outputs
from stpp.dataset import index, layouts, official, splits
from stpp.dataset.notes import Notes
from stpp.dataset.walk import walk
from stpp.errors import UserError
from stpp.images.folders import SkippedFiles
from stpp.run.preflight import _warn_of_overlaps


@pytest.fixture
def root(tmp_path):
    return data_set(tmp_path / "data", {f"{i}": ids(1, 2) for i in range(4)})


def mask(path, values=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids(1, 2) if values is None else values).save(path)
    return path


def find(root, images, masks=None, **options):
    return [(one.image, one.mask) for one in layouts.find(root, "globs", images, masks, **options)]


# --- patterns


def test_folder_with_wildcards_in_its_name_is_found(tmp_path):
    for folder in ("shots [1]", "shots {a,b}", "shots 1", "what?"):
        photo(tmp_path / folder / "x.jpg")
    for folder in ("shots [1]", "shots {a,b}", "what?"):
        assert find(tmp_path, f"{folder}/**/*") == [(f"{folder}/x.jpg", None)]
    assert find(tmp_path, "shots [12]/*.jpg") == [("shots 1/x.jpg", None)]


def test_brackets_after_a_wildcard_are_a_set_or_literal(tmp_path):
    for folder in ("a/shots [1]", "a/shots 2"):
        photo(tmp_path / folder / "x.jpg")
    assert find(tmp_path, "*/shots [1]/*.jpg") == [("a/shots [1]/x.jpg", None)]
    assert find(tmp_path, "*/shots [12]/*.jpg") == [("a/shots 2/x.jpg", None)]


def test_braces_expand_to_words(tmp_path):
    for number, folder in enumerate(("field a", "field b", "field c")):
        photo(tmp_path / folder / "photos" / f"{number}.jpg", number)
        photo(tmp_path / folder / "photos" / f"p{number}.png", number)
        mask(tmp_path / folder / "labels" / f"{number}.png")
    both = [
        ("field a/photos/0.jpg", "field a/labels/0.png"),
        ("field b/photos/1.jpg", "field b/labels/1.png"),
    ]
    assert find(tmp_path, "field {a,b}/photos/*.jpg", "field {a,b}/labels/*.png") == both
    assert [image for image, _ in find(tmp_path, "field a/photos/*.{jpg,png}")] == [
        "field a/photos/0.jpg",
        "field a/photos/p0.png",
    ]
    assert [image for image, _ in find(tmp_path, "*/photos/{0..1}.jpg")] == [image for image, _ in both]
    for bad in ("{a,*}/*.jpg", "{a/b,c}/*.jpg", "{1..9999999}/*.jpg"):
        with pytest.raises(UserError, match="braces"):
            find(tmp_path, bad)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_match_in_any_form(tmp_path, forms):
    in_pattern, on_disk = (unicodedata.normalize(form, "été") for form in forms)
    photo(tmp_path / on_disk / f"{on_disk}.jpg")
    assert find(tmp_path, f"{in_pattern}/*.jpg") == [(f"{on_disk}/{on_disk}.jpg", None)]
    assert find(tmp_path, f"*/{in_pattern}*.jpg") == [(f"{on_disk}/{on_disk}.jpg", None)]


@pytest.mark.slow
def test_names_match_without_a_locale(root, tmp_path):
    (root / "photos" / "0.jpg").rename(root / "photos" / "größe ñ.jpg")
    (root / "labels" / "0.png").rename(root / "labels" / f"{unicodedata.normalize('NFD', 'größe ñ')}.png")
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))
    }
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "stpp",
            "prepare",
            "--data.root",
            root,
            "--data.layout",
            "globs",
            "--data.images",
            "photos/**/*",
            "--data.masks",
            "labels/**/*.png",
            "--out",
            tmp_path / "index",
        ],
        capture_output=True,
        timeout=120,
        check=False,
        env=plain | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "photos/größe ñ.jpg" in index.load(tmp_path / "index").entries


# --- what is no image


def test_leftovers_are_skipped_and_counted(root, capsys):
    for folder in ("@eaDir/0.jpg", "#recycle", "lost+found", "$RECYCLE.BIN/S-1"):
        photo(root / "photos" / folder / "THUMB.jpg")
    for name in ("Thumbs.db", "Icon\r", "._0.jpg", "a.heic", "b.HEIC", "c.dng", "README", "list.txt"):
        (root / "photos" / name).write_bytes(b"left behind")
    photo(root / "photos" / "plain.jpg", 9).rename(root / "photos" / "saved.jfif")
    photo(root / "photos" / "other.jpg", 8).rename(root / "photos" / "other.JPE")
    made = prepare(root)
    assert len(made.entries) == 6 and {"photos/saved.jfif", "photos/other.JPE"} < set(made.entries)
    said = capsys.readouterr().err
    assert "2 .heic, 1 .dng, 1 .txt, 1 without an extension: unsupported formats" in said
    for name in ("@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "Thumbs.db", "Icon", "._*"):
        assert f"1 {name}" in said
    assert any(".heic" in text for text in made.warnings)


def test_folder_of_unsupported_pictures_is_reported(tmp_path):
    for name in ("a.heic", "b.avif"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no image found; .*1 \.avif, 1 \.heic"):
        find(tmp_path, "**/*")


@pytest.mark.parametrize(("images", "masks"), [("**/*.png", "**/*_mask.png"), ("**/*", "**/*_label.png")])
def test_masks_next_to_images_are_no_images(tmp_path, images, masks, capsys):
    ending = masks[4:-4].strip("*")
    for i in range(3):
        photo(tmp_path / "a" / f"x ({i}).png", i)
        mask(tmp_path / "a" / f"x ({i}){ending}.png")
    mask(tmp_path / "a" / f"x (1){ending}_1.png")
    found = find(tmp_path, images, masks)
    assert found == [(f"a/x ({i}).png", f"a/x ({i}){ending}.png") for i in range(3)]
    said = capsys.readouterr().err
    assert (
        "match both patterns: 3 files" in said
        and f"further masks of images that have one; draw all objects of an image into "
        f"one mask: 1 file, for example a/x (1){ending}_1.png next to a/x (1).png"
        in said
    )


@pytest.mark.parametrize(("images", "masks", "names"), [
    ("img_*.jpg", "mask_*.png", ("img_1.jpg", "mask_1.png")),
    ("a/**/IMG*.jpg", "b/**/seg-*.png", ("a/x/IMG1.jpg", "b/x/seg-1.png")),
    ("photos/*.jpg", "labels/mask_*.png", ("photos/1.jpg", "labels/mask_1.png")),
    ("im_[0-9]*.jpg", "gt_[0-9]*.png", ("im_1.jpg", "gt_1.png")),
])
def test_fixed_prefixes_are_not_part_of_a_name(tmp_path, images, masks, names):
    photo(tmp_path / names[0])
    mask(tmp_path / names[1])
    assert find(tmp_path, images, masks) == [names]


def test_whole_names_pair_before_names_without_prefixes(tmp_path):
    for name in ("im_1.jpg", "im_g_1.jpg"):
        photo(tmp_path / name)
    mask(tmp_path / "im_1.png")
    for masks in ("im_*.png", "i*.png"):
        assert find(tmp_path, "im_*.jpg", masks) == [("im_1.jpg", "im_1.png"), ("im_g_1.jpg", None)]


def test_masks_next_to_unlabelled_images_are_no_images(root, tmp_path, capsys):
    for name in ("u.jpg", "u_mask.png", "v.jpg"):
        photo(tmp_path / "more" / name, hash(name) % 99)
    made = prepare(root, unlabelled=[tmp_path / "more"])
    assert [image for image in made.entries if image.startswith("more")] == ["more/u.jpg", "more/v.jpg"]
    assert "masks of images next to them" in capsys.readouterr().err


def test_a_folder_of_masks_among_unlabelled_images_holds_no_images(root, tmp_path, capsys):
    for i in range(3):
        photo(tmp_path / "field" / "images" / f"{i}.jpg", 20 + i)
        mask(tmp_path / "field" / "masks" / f"{i}.png")
    made = prepare(root, unlabelled=[tmp_path / "field"])
    assert [image for image in made.entries
            if image.startswith("field")] == [f"field/images/{i}.jpg" for i in range(3)]
    assert "masks of images next to them; give --data.masks" in capsys.readouterr().err


def test_two_masks_of_one_image_name_the_newer(root):
    mask(root / "labels" / "1.PNG")
    os.utime(root / "labels" / "1.PNG", ns=(1, 1))
    with pytest.raises(
        UserError,
        match=r"labels/1\.PNG and labels/1\.png; rename or remove one \(labels/1\.png is the newer\)",
    ):
        prepare(root)


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("annotations", "annotations/ holds PNGs"),
        ("labels", "labels/ holds PNGs"),
        ("SegmentationMasks", "SegmentationMasks/ holds PNGs"),
    ],
)
def test_layout_without_masks_names_the_folder_that_has_them(tmp_path, folder, said):
    photo(tmp_path / "data" / "images" / "training" / "0.jpg")
    mask(tmp_path / "data" / folder / "training" / "0.png")
    for layout in ("auto", "camvid"):
        with pytest.raises(UserError, match=said):
            index.prepare(
                tmp_path / "data", tmp_path / "index", layout=layout, classes=("a", "b", "c"), progress=False
            )


def test_layout_without_any_mask_causes_a_warning(tmp_path):
    photo(tmp_path / "data" / "images" / "0.jpg")
    (tmp_path / "data" / "labels").mkdir()
    (tmp_path / "data" / "labels" / "0.txt").write_text("0 0.5 0.5 1 1")
    made = index.prepare(tmp_path / "data", tmp_path / "index", classes=("a", "b"), progress=False)
    assert any("masks/ contains no mask; labels/ holds text files" in text for text in made.warnings)


def test_voc_masks_are_taken_from_both_folders(tmp_path, capsys):
    for i in range(5):
        photo(tmp_path / "data" / "JPEGImages" / f"{i}.jpg", i)
        mask(tmp_path / "data" / ("SegmentationClass" if i > 2 else "SegmentationClassAug") / f"{i}.png")
    mask(tmp_path / "data" / "SegmentationClass" / "0.png")
    found = [one.mask for one in layouts.find(tmp_path / "data")]
    assert found == [f"SegmentationClass{'Aug' * (i < 3)}/{i}.png" for i in range(5)]
    assert "2 masks from SegmentationClass/" in capsys.readouterr().err


# --- links and copies


def test_links_out_of_the_root_are_followed_by_the_flag(root, tmp_path):
    for folder in ("photos", "labels"):
        shutil.move(root / folder, tmp_path / "disk2" / folder)
        (root / folder).symlink_to(tmp_path / "disk2" / folder)
    with pytest.raises(UserError, match="--data.follow-links"):
        prepare(root)
    made = prepare(root, follow_links=True)
    assert made.counts["masks"] == 4 and made.settings["follow_links"] is True
    assert not index.is_stale(made.out, root, **GLOBS, follow_links=True)


def test_a_file_that_links_reach_twice_is_one_image(root, capsys):
    for folder in ("photos", "labels"):
        (root / folder / "b").symlink_to(root / folder)
    (root / "photos" / "alone.jpg").symlink_to("2.jpg")
    os.link(root / "photos" / "3.jpg", root / "photos" / "hard.jpg")
    made = prepare(root)
    assert list(made.entries) == [f"photos/{i}.jpg" for i in range(4)] and made.counts["masks"] == 4
    assert (
        "links lead to the same file: 2 images" in capsys.readouterr().err
    )  # the folder links back to its parent


def test_a_folder_linked_twice_gives_each_image_once(tmp_path):
    root = data_set(tmp_path / "data", {f"a/{i}": ids(1, 2) for i in range(3)})
    for folder in ("photos", "labels"):
        (root / folder / "b").symlink_to("a")
    assert list(prepare(root).entries) == [f"photos/a/{i}.jpg" for i in range(3)]


def test_of_linked_names_the_one_with_mask_or_validation_is_kept(tmp_path):
    root = data_set(tmp_path / "data", {"train/0": ids(1, 2), "train/1": ids(2, 1), "val/9": ids(1, 2)})
    (root / "photos" / "a link.jpg").symlink_to("train/0.jpg")
    (root / "photos" / "val" / "1.jpg").symlink_to("../train/1.jpg")
    (root / "labels" / "val" / "1.png").symlink_to("../train/1.png")
    assert list(prepare(root).entries) == ["photos/train/0.jpg", "photos/val/1.jpg", "photos/val/9.jpg"]


def test_one_file_with_two_masks_that_differ_is_refused(tmp_path):
    root = data_set(tmp_path / "data", {"0": ids(1, 2), "1": ids(2, 1)})
    (root / "photos" / "1.jpg").unlink()
    (root / "photos" / "1.jpg").symlink_to("0.jpg")
    with pytest.raises(UserError, match="are one file, through a link, but their masks .* differ"):
        prepare(root)


@pytest.mark.parametrize("where", ["in the root", "in a further folder"])
def test_copies_are_found_by_bytes_and_leaks_cause_warnings(tmp_path, where):
    root = data_set(tmp_path / "data", {**{f"train/{i}": ids(1, 2) for i in range(3)}, "val/v": ids(1, 2)})
    (root / "photos" / "train" / "other size.jpg").write_bytes(
        (root / "photos" / "train" / "0.jpg").read_bytes() + b"x"
    )
    folder = root / "photos" / "train" if where == "in the root" else tmp_path / "more"
    folder.mkdir(exist_ok=True)
    shutil.copy(root / "photos" / "val" / "v.jpg", folder / "copy.jpg")
    made = prepare(root, unlabelled=[tmp_path / "more"] if where != "in the root" else [])
    copy = next(image for image in made.entries if image.endswith("copy.jpg"))
    assert made.twins == {copy: 0, "photos/val/v.jpg": 0} == index.load(made.out).twins
    assert any("exact copies of other images: 1 image" in text for text in made.warnings)
    notes = Notes()
    splits.make_split(made, tmp_path / "split", fraction="1/1", notes=notes)
    assert any(
        "training images that are copies of validation images: 1 image, for example "
        f"{copy} of photos/val/v.jpg"
        in text
        for text in notes.warnings
    )
    lists = {
        name: splits.read_split(tmp_path / "split" / name, made, labelled=name != "unlabeled.txt")
        for name in ("unlabeled.txt", "val.txt")
    }
    notes = Notes()
    _warn_of_overlaps(lists, {made.entries[image].key: number for image, number in made.twins.items()}, notes)
    assert [
        text for text in notes.warnings if "1 images of val.txt are copies of images of unlabeled.txt" in text
    ]


# --- official splits


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "valid", "Test"),
        ("train2017", "val2017", "test2015"),
        ("Train_2012", "VAL-2012", "test_1999"),
    ],
)
def test_official_folders_in_any_case(tmp_path, train, val, test, capsys):
    names = (
        [f"{train}/{i}" for i in range(4)]
        + [f"x/{val}/{i}" for i in range(2)]
        + [f"{test}/{i}" for i in range(3)]
    )
    made = prepare(data_set(tmp_path / "data", {name: ids(1, 2) for name in names}))
    said = capsys.readouterr().err
    assert f"official validation: 2 images in photos/x/{val}, never trained on" in said
    assert f"official test, and so in no list: 3 images in photos/{test}, 3 with a mask" in said
    splits.make_split(made, tmp_path / "split", fraction="1/1")
    lists = {path.stem: path.read_text().splitlines() for path in (tmp_path / "split").iterdir()}
    assert {name: len(lines) for name, lines in lists.items()} == {"labeled": 4, "unlabeled": 0, "val": 2}


def test_validation_without_training_is_drawn_from_with_a_warning(tmp_path):
    made = prepare(
        data_set(tmp_path / "data", {"val/0": ids(1, 2), "trainer/1": ids(1, 2), "test flight/2": ids(1, 2)})
    )
    assert official.validation(made) == set() == official.test(made)
    assert any("no official validation, though 1 image lie in photos/val" in text for text in made.warnings)


def test_folders_named_similarly_to_splits_are_reported(tmp_path):
    names = ("train/0", "val_images/1", "dev/2", "TestSet/3", "x/val 2/4", "tester/5", "valley/6",
             "photos 2017/7")
    made = prepare(data_set(tmp_path / "data", {name: ids(1, 2) for name in names}))
    assert official.validation(made) == set() == official.test(made)
    assert made.warnings == (
        "folders called TestSet, dev, val 2, val_images are not official splits, so their 4 images are used "
        "like any other; to make them splits, rename them to train, val or test; otherwise choose other "
        "names",
    )


def test_strict_turns_warnings_into_errors(root):
    (root / "photos" / "a.heic").write_bytes(b"x")
    made = prepare(root)
    assert len(made.warnings) == 1
    with pytest.raises(UserError, match=r"--strict: skipped: 1 \.heic"):
        prepare(root, strict=True)
    assert not (made.out / "index.json").exists()
    (root / "photos" / "a.heic").unlink()
    assert prepare(root, strict=True).warnings == ()


def test_photograph_named_like_a_mask_word_is_a_photograph(tmp_path):
    """A photograph whose whole name is a mask word remains a photograph."""
    for name in ("mask.jpg", "seg.png", "7_mask.jpg"):
        photo(tmp_path / name, len(name))
    assert [image for image, _ in find(tmp_path, "*")] == ["7_mask.jpg", "mask.jpg", "seg.png"]
    assert np.asarray(Image.open(tmp_path / "mask.jpg")).any()


def test_folders_of_runs_and_indices_hold_no_images(tmp_path):
    for path in ("a.png", "runs/x/examples.png", "runs/x/stages/masks/a.png", "other/index/masks/a.png",
                 "b/a.png"):
        mask(tmp_path / path)
    (tmp_path / "runs" / "x" / "provenance.json").write_text("{}")  # a finished run has no lease
    (tmp_path / "other" / "index" / ".stpp-index").touch()
    skipped = SkippedFiles()
    assert sorted(walk(tmp_path, "", skipped=skipped)) == ["a.png", "b/a.png"]
    assert "2 folders with outputs of stpp (a run, an index, masks)" in skipped.lines()


def test_link_to_itself_is_named(root):
    (root / "loop.png").symlink_to("loop.png")
    with pytest.raises(UserError, match=r"loop\.png: cannot be read"):
        list(walk(root, "", follow_links=True))


@pytest.mark.parametrize("pattern", ["photos/[z-a]*.jpg", "photos/[!]*.jpg"])
def test_invalid_set_in_a_pattern_is_named(root, pattern):
    with pytest.raises(UserError, match=r"--data\.images photos/.*the set in brackets is invalid"):
        find(root, pattern)


def test_pattern_with_a_very_long_word_is_searched(root):
    with pytest.raises(UserError, match="no image found"):
        find(root, "{" + ",".join("abcdefgh"[i % 8] * 40 for i in range(8)) + "}/*.jpg")


def test_outputs_beside_data_hold_no_images(tmp_path):
    """Of a folder with outputs, only what was written there is skipped."""
    for path in ("photos/a.png", "masks/a.png", "overlays/a.png", "auto/masks/a.png", "auto/b.png"):
        mask(tmp_path / path)
    for folder, names in ((tmp_path, ["overlays"]), (tmp_path / "auto", ["masks"])):
        (folder / outputs.MARK).write_text("".join(f"{name}\n" for name in names))
    skipped = SkippedFiles()
    assert sorted(walk(tmp_path, "", skipped=skipped)) == ["auto/b.png", "masks/a.png", "photos/a.png"]
    assert skipped.runs == 2
    assert list(walk(tmp_path, "auto/masks")) == ["auto/masks/a.png"]  # asked for by name


def test_files_of_others_are_not_claimed(tmp_path):
    mask(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match="contains masks, which stpp did not write"):
        outputs.claim(tmp_path, ("overlays", "masks"))
    assert not (tmp_path / outputs.MARK).exists()
    outputs.claim(tmp_path, ("overlays",))
    with pytest.raises(UserError, match="contains masks, which"):
        outputs.claim(tmp_path, ("overlays", "masks"))
    outputs.claim(tmp_path, ("overlays", "report"))
    mask(tmp_path / "report" / "a.png")
    outputs.claim(tmp_path, ("report",))
    assert outputs.written(tmp_path) == {"overlays", "report"}
    outputs.claim(tmp_path / "new" / "folder", ("masks",))
    mask(tmp_path / "old" / "masks" / "a.png")
    (tmp_path / "old" / "run.json").touch()
    outputs.claim(tmp_path / "old", ("masks",), earlier="run.json")


def test_folder_named_like_a_mask_is_refused(tmp_path):
    photo(tmp_path / "photos" / "q.jpg", 1)
    photo(tmp_path / "photos" / "q.png" / "x.jpg", 2)
    with pytest.raises(UserError, match="the folder photos/q.png has the name of the mask of photos/q.jpg"):
        find(tmp_path, "photos/**/*")
