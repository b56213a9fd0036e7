"""Official splits: a data set's own lists and folders for training, validation and test.

VOC and CVAT: ImageSets/Segmentation/{train,val,test}.txt. COCO: also the names of its JSON files
(instances_val2017.json). Otherwise folders at any depth, by name and in any case: see
stpp.dataset.split_folders. Validation counts only alongside training; test images are in no list.
"""

import os
import re
from pathlib import Path

from stpp import files
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.dataset.split_folders import is_nearly_official, kind, kinds
from stpp.errors import UserError

_LISTED = ("voc", "cvat")


def validation(index: Index, notes: Notes | None = None) -> set[str]:
    """Official validation images; empty if the data set names none."""
    lists = _lists(index)
    if index.layout in _LISTED and (lists / "train.txt").is_file() and (lists / "val.txt").is_file():
        return _listed(index, lists / "val.txt", notes or Notes())
    return in_folders(index, "val") if in_folders(index, "train") else set()


def test(index: Index, notes: Notes | None = None) -> set[str]:
    """Official test images, which are in no list."""
    listed = _lists(index) / "test.txt"
    if index.layout in _LISTED and listed.is_file():
        return _listed(index, listed, notes or Notes())
    return in_folders(index, "test")


def say(index: Index, notes: Notes) -> dict[str, int]:
    """Reports the official splits and the images that no list contains; returns the number of images per
    split."""
    test_images, validation_images = test(index, notes), validation(index, notes)
    without_mask = [image for image in validation_images if index.entries[image].mask is None]
    if validation_images:
        notes.line(f"official validation: {counted(len(validation_images), 'image')}"
                   f"{_folders(validation_images)}, never trained on")
    if without_mask:
        text = (
            f"official validation without a mask, and so in no list: {len(without_mask)} of "
            f"{counted(len(validation_images), 'image')}, for example {min(without_mask)}"
        )
        (notes.warn if len(without_mask) == len(validation_images) else notes.line)(text)
    if test_images:
        with_mask = sum(index.entries[image].mask is not None for image in test_images)
        text = (
            f"official test, and so in no list: {counted(len(test_images), 'image')}{_folders(test_images)}, "
            f"{with_mask} with a mask"
        )
        (notes.warn if with_mask else notes.line)(
            f"{text}; if this is not a test set, rename the folder"
        )
    if not validation_images and (in_val_folders := in_folders(index, "val")):
        notes.warn(
            f"no official validation, though {counted(len(in_val_folders), 'image')} lie"
            f"{_folders(in_val_folders)}: no folder is called train or training, so these images are used "
            "like any other"
        )
    _say_nearly_official(index, notes)
    return {"validation": len(validation_images), "test": len(test_images),
            "others": len(index.entries) - len(validation_images | test_images)}


def _say_nearly_official(index: Index, notes: Notes) -> None:
    """Warns of folder names that resemble official splits but are not in the table."""
    images = [
        image
        for image in index.entries
        if image.partition("/")[0] not in index.unlabelled
        and not kinds(image)
        and any(is_nearly_official(part) for part in image.split("/")[:-1])
    ]
    if images:
        folders = sorted({part for image in images for part in image.split("/")[:-1]
                          if is_nearly_official(part)})
        notes.warn(
            f"folders called {', '.join(folders[:4])}{', ...' * (len(folders) > 4)} are not official splits, "
            f"so their {counted(len(images), 'image')} are used like any other; to make them splits, rename "
            "them to train, val or test; otherwise choose other names"
        )


def in_folders(index: Index, kind: str) -> set[str]:
    """The data root's images in folders of a kind; images of further folders count as unlabelled wherever
    they are."""
    kinds_of = {}
    if index.layout == "coco":
        listed = {image: index.entries[image].listed or "" for image in index.entries}
        kinds_of = {image: kinds("/".join([*re.split(r"[_.\-]", Path(file).stem), ""]))
                    for image, file in listed.items()}
    return {
        image
        for image in index.entries
        if image.partition("/")[0] not in index.unlabelled
        and kind in kinds(image) | kinds_of.get(image, set())
    }


def _folders(images: set[str]) -> str:
    """Text such as " in photos/test" if the images are in split folders; otherwise empty."""
    names = sorted(
        {
            "/".join(parts[: i + 1])
            for image in images
            for parts in [image.split("/")]
            for i, part in enumerate(parts[:-1])
            if kind(part)
        }
    )
    return f" in {', '.join(names[:3])}{', ...' * (len(names) > 3)}" if names else ""


def _lists(index: Index) -> Path:
    return index.root / "ImageSets" / "Segmentation"


def _listed(index: Index, path: Path, notes: Notes) -> set[str]:
    """Images named in one of VOC's own lists, there without folder and extension.

    Raises:
        UserError: not a list, or no line names an image.
    """
    try:
        lines = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a list of image names ({error})") from error
    image_of = {os.path.splitext(image)[0]: image for image in index.entries} | {
        image: image for image in index.entries}
    # A name may hold spaces or an extension; some lists have a second column, or paths.
    images = {
        line: next(filter(None, (image_of.get(folder + name) for name in (line, line.split()[0])
                                 for folder in ("JPEGImages/", ""))), None)
        for line in lines
    }
    missing = sum(image is None for image in images.values())
    if lines and missing == len(images):
        raise UserError(f"{path}: none of its {len(images)} lines names an image, for example "
                        f"{lines[0][:80]!r}; correct it: its images would be used like any other")
    if missing:
        notes.warn(f"{path}: {missing} of its {len(images)} images are not in the index")
    return {image for image in images.values() if image is not None}
