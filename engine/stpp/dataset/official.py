"""Official splits: the lists and folders with which a data set itself says what is for training, validation
and test.

VOC and CVAT: ImageSets/Segmentation/{train,val,test}.txt. COCO: also the names of its JSON files
(instances_val2017.json). Else folders, at any depth, by their names in any case: see
stpp.dataset.split_folders. Validation counts where there is training beside it; images for test are in no
list.
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
    """The validation images that the data set itself names; empty if it names none."""
    lists = _lists(index)
    if index.layout in _LISTED and (lists / "train.txt").is_file() and (lists / "val.txt").is_file():
        return _listed(index, lists / "val.txt", notes or Notes())
    return in_folders(index, "val") if in_folders(index, "train") else set()


def test(index: Index, notes: Notes | None = None) -> set[str]:
    """The images that are for test, which no list takes."""
    listed = _lists(index) / "test.txt"
    if index.layout in _LISTED and listed.is_file():
        return _listed(index, listed, notes or Notes())
    return in_folders(index, "test")


def say(index: Index, notes: Notes) -> dict[str, int]:
    """Says which images the data set's own lists or folders set apart, and what is left out of all lists;
    returns how many."""
    apart, held = test(index, notes), validation(index, notes)
    unpaired = [image for image in held if index.entries[image].mask is None]
    if held:
        notes.line(
            f"official validation: {counted(len(held), 'image')}{_folders(held)}, never trained on"
        )
    if unpaired:
        text = (
            f"official validation without a mask, and so in no list: {len(unpaired)} of "
            f"{counted(len(held), 'image')}, for example "
            f"{min(unpaired)}"
        )
        (notes.warn if len(unpaired) == len(held) else notes.line)(text)
    if apart:
        masked = sum(index.entries[image].mask is not None for image in apart)
        text = (
            f"official test, and so in no list: {counted(len(apart), 'image')}{_folders(apart)}, "
            f"{masked} with a mask"
        )
        (notes.warn if masked else notes.line)(
            f"{text}; if this is no test set, give the folder another name"
        )
    if not held and (alone := in_folders(index, "val")):
        notes.warn(
            f"no official validation, though {counted(len(alone), 'image')} lie{_folders(alone)}: no "
            f"folder is called train "
            "or training, so they are drawn from like the others"
        )
    _say_nearly_official(index, notes)
    return {"validation": len(held), "test": len(apart), "others": len(index.entries) - len(held | apart)}


def _say_nearly_official(index: Index, notes: Notes) -> None:
    """Names folders that may be official splits to their owner, and are none by the table."""
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
            f"folders called {', '.join(folders[:4])}{', ...' * (len(folders) > 4)} are no official splits, "
            f"and their {counted(len(images), 'image')} are taken like any other; for splits call them "
            "train, val or test; if they are none, give them other names"
        )


def in_folders(index: Index, kind: str) -> set[str]:
    """The data root's images in a folder of a kind; those of further folders were given as unlabelled,
    wherever they lie."""
    named = {}
    if index.layout == "coco":
        masks = {image: index.entries[image].mask or "" for image in index.entries}
        named = {image: kinds("/".join([*re.split(r"[_.\-]", Path(mask).stem), ""]))
                 for image, mask in masks.items()}
    return {
        image
        for image in index.entries
        if image.partition("/")[0] not in index.unlabelled and kind in kinds(image) | named.get(image, set())
    }


def _folders(images: set[str]) -> str:
    """ " in photos/test", where the images lie in folders of the table."""
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
    """The images that one of VOC's own lists names by their bare names."""
    try:
        lines = [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a list of image names ({error})") from error
    known = {os.path.splitext(image)[0]: image for image in index.entries}
    # A name may hold spaces; some lists have a second column.
    found = {
        name: known.get(f"JPEGImages/{name}") or known.get(f"JPEGImages/{name.split()[0]}") for name in lines
    }
    missing = sum(image is None for image in found.values())
    if missing:
        notes.warn(f"{path}: {missing} of its {len(found)} images are not in the index")
    return {image for image in found.values() if image is not None}
