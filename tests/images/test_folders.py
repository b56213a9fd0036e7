"""Other contents of folders of images: leftovers of systems, hidden files, masks next to their images."""

import pytest

from stpp.images.folders import (
    SkippedFiles,
    folders_of,
    image_of_mask,
    image_of_mask_in_folder,
    is_leftover,
    is_passed_over,
)


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir",
        "#recycle",
        "$RECYCLE.BIN",
        "$Recycle.Bin",
        "System Volume Information",
        "lost+found",
        "__MACOSX",
        "@Recycle",
        "#snapshot",
        ".Trashes",
        "Network Trash Folder",
    ],
)
def test_folders_of_systems(name):
    assert is_passed_over(name, is_folder=True) and is_leftover(name, is_folder=True)


@pytest.mark.parametrize(
    "name", ["Thumbs.db", "desktop.ini", "Desktop.ini", "Icon\r", "._IMG_1.JPG", "ehthumbs.db"]
)
def test_files_of_systems(name):
    assert is_leftover(name, is_folder=False)


@pytest.mark.parametrize(
    ("name", "is_folder"),
    [
        ("recycle", True),
        ("Icon", False),
        ("thumbs.jpg", False),
        ("@home", True),
        ("#1.jpg", False),
        ("$5 bill.png", False),
        ("Thumbs.db", True),
        ("_IMG.jpg", False),
        ("lost", True),
    ],
)
def test_similar_names_are_kept(name, is_folder):
    assert not is_passed_over(name, is_folder=is_folder)


@pytest.mark.parametrize(
    "mask",
    [
        "a/7_mask",
        "a/7-mask",
        "a/7.mask",
        "a/7_Mask_1",
        "a/7_mask2",
        "a/7_mask (2)",
        "a/7_label",
        "a/7_seg",
        "a/7_segmentation",
        "a/7_labelIds",
        "a/7_gt",
    ],
)
def test_masks_next_to_their_images(mask):
    assert image_of_mask(mask, {"a/7", "a/8"}) == "a/7"


@pytest.mark.parametrize(
    ("mask", "image"),
    [
        ("a/mask_7", "a/7"),
        ("a/Mask-7", "a/img-7"),
        ("a/mask_7", "a/IMG_7"),
        ("a/mask7", "a/image7"),
        ("label 7", "Photo 7"),
        ("a/gt_x_1", "a/x_1"),
    ],
)
def test_masks_next_to_their_images_with_a_prefix(mask, image):
    assert image_of_mask(mask, {image, "b/7"}) == image
    assert image_of_mask(mask, {"b/7", "c/img_7"}) is None


@pytest.mark.parametrize("other", ["a/mask7", "a/maskara_7", "a/unmask_7", "mask/7", "a/mask_"])
def test_names_with_a_common_prefix_are_images(other):
    assert image_of_mask(other, {"a/7", "7", "a/"}) is None


@pytest.mark.parametrize(
    "other", ["a/7", "a/mask", "a/9_mask", "b/7_mask", "a/7mask", "a/7_masked", "a/7_2", "a/_mask"]
)
def test_other_names_are_images(other):
    assert image_of_mask(other, {"a/7", "a/8"}) is None


@pytest.mark.parametrize(("keys", "found"), [
    (["images/a/7", "masks/a/7", "masks/a/8"], {"masks/a/7": "images/a/7"}),
    (["a/7", "a/Labels/7", "b/7"], {"a/Labels/7": "a/7"}), (["set/photos/7", "set/annotations/7"], {
        "set/annotations/7": "set/photos/7"}),
    (["labels/7", "bottles/8"], {}), (["masks/7", "labels/7"], {}), (["a/7", "b/7"], {}),
    (["mask", "7"], {})])
def test_folders_of_masks_next_to_folders_of_images(keys, found):
    folders = folders_of(keys)
    images = {key: image_of_mask_in_folder(key, set(keys), folders) for key in keys}
    assert {key: image for key, image in images.items() if image} == found


def test_skipped_files_are_counted_and_named():
    passed = SkippedFiles()
    taken = [
        name
        for name in ("a.jpg", ".DS_Store", "._a.jpg", "Thumbs.db", "@eaDir")
        if not passed.add(name, is_folder=name[0] == "@")
    ]
    for name in ("a.HEIC", "b.heic", "c.avif", "README", "notes.txt"):
        passed.unread(name)
    assert taken == ["a.jpg"] and passed.pictures() == 4
    assert passed.lines() == [
        "2 .heic, 1 .avif, 1 .txt, 1 without an extension: unsupported formats",
        "1 ._*, 1 @eaDir, 1 Thumbs.db: system files",
        "1 hidden (names that begin with a dot)",
    ]
