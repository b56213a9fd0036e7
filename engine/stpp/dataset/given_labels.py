"""Pseudo labels from a folder: masks that `stpp label` or a run made, that a person has looked at, and
perhaps mended.

They are read and checked like the masks of a data set before they are trained on.
"""

import dataclasses
import json
import os
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from stpp import files
from stpp.annotations import cvat
from stpp.dataset import legends, mask_map, splits
from stpp.dataset.check import Task, check_all
from stpp.dataset.entries import Index
from stpp.dataset.mask_judge import Judge
from stpp.dataset.mask_map import MaskMap
from stpp.errors import UserError
from stpp.loading.sample import Sample

NAME = "given.json"


def check(samples: Sequence[Sample], folder: Path, index: Index, out: Path, *, exclude: Path | None = None,
          began: bool = False) -> None:
    """Finds and checks the masks of samples, and writes which they are to `out`.

    The mask of an image is the PNG in `folder`, or in its `masks`, with the image's path below the data root,
    or below the first folder there (`stpp label --source DATA/photos` leaves `photos` out). Masks of CVAT in
    its `SegmentationClass`, beside the `labelmap.txt` that says what their colours mean, win over the others:
    an export of corrected masks is unpacked into the folder of the labels. Samples without a mask are left
    out.

    Args:
        samples: unlabelled images.
        index: of their data set.
        out: folder for the list, and for masks that had to be written anew.
        exclude: a list of images that are left out, lines as in a split.
        began: training on an earlier list has begun: another one is refused.

    Raises:
        UserError: no folder, no mask of any sample, a mask that is broken, of another size or with ids
            outside the class list, a list with unknown images, or masks that changed.
    """
    if not folder.is_dir():
        raise UserError(f"--pseudo-labels {folder}: there is no such folder")
    excluded = {sample.key
                for sample in splits.read_split(exclude, index, labelled=False)} if exclude else set()
    wanted = [sample for sample in samples if sample.key not in excluded]
    corrected, others = _found(wanted, folder.absolute())
    found = others | corrected
    stamps = {}
    for key, path in found.items():
        status = os.stat(path)
        stamps[key] = [path, status.st_size, status.st_mtime_ns]
    if began:  # they were checked then
        if _read(out)["stamps"] != stamps:
            raise UserError(f"--pseudo-labels {folder}: masks, or the excluded images, changed since this "
                            "run began; choose another --out")
        return
    image_of = {sample.key: sample.image for sample in samples}
    masks, problems, pixels = {}, [], [0] * len(index.classes)
    of_colours = _meaning(folder, index.classes) if corrected else None
    for group, meaning in ((corrected, of_colours), (others, None)):
        tasks = [Task(key, image_of[key], path, 0, 0) for key, path in group.items()]
        written, found_problems, counted = _checked(tasks, index, out, meaning)
        masks, problems = masks | written, problems + found_problems
        pixels = [a + b for a, b in zip(pixels, counted, strict=True)]
    if problems:
        more = f" (and {len(problems) - 1} more such masks)" if len(problems) > 1 else ""
        raise UserError(f"--pseudo-labels: {problems[0]}{more}; mend them, or name their images in --exclude")
    files.write_json(out / NAME, {"masks": masks, "stamps": stamps, "class_pixels": pixels})


def _checked(tasks: list[Task], index: Index, out: Path,
             meaning: MaskMap | None) -> tuple[dict[str, str], list[str], list[int]]:
    """Masks to train on by key, what is wrong with them, and the pixels of each class."""
    masks, problems, judge = {}, [], Judge(index.classes, meaning)
    pixels = [0] * len(index.classes)
    for chunk in check_all(tasks, (str(index.root), str(out), len(index.classes), index.exif, meaning)):
        for one in chunk:
            problems += one.problems
            masks[one.task.key] = str(out / one.converted) if one.converted else one.task.mask
            if one.class_pixels is not None:
                pixels = [a + b for a, b in zip(pixels, one.class_pixels, strict=True)]
                judge.add(one.task.mask, one.stored, [*one.class_pixels, one.ignored], one.edges)
    # Of masks together, stored forms alone: teachers leave specks, and 255 where they are not sure.
    return masks, problems + judge.stored_problems(), pixels


def attach(samples: Sequence[Sample], out: Path) -> list[Sample]:
    """The samples that have a mask in the list that `check` wrote, with it, to be augmented strongly."""
    masks = _read(out)["masks"]
    return [dataclasses.replace(sample, mask=masks[sample.key], strong=True) for sample in samples
            if sample.key in masks]


def _read(out: Path) -> dict:
    try:
        return json.loads((out / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out / NAME}: cannot be read ({error}); choose another --out") from error


def _meaning(folder: Path, classes: Sequence[str]) -> MaskMap:
    """What the colours of CVAT's masks mean."""
    return mask_map.parse(legends.of_colours(folder, cvat.labels_in(folder), classes), classes)


def _found(samples: Sequence[Sample], folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Masks by the samples' keys: those of CVAT, and the others."""
    corrected = _below(samples, folder, "SegmentationClass") if cvat.labels_in(folder) is not None else {}
    rest = [sample for sample in samples if sample.key not in corrected]
    others = _below(rest, folder, "masks") or _below(rest, folder, "")
    if corrected or others:
        return corrected, others
    example = f"{samples[0].key}.png" if samples else "the images that are not excluded"
    raise UserError(f"--pseudo-labels {folder}: no mask of an unlabelled image is in it; looked for "
                    f"{example}")


def _below(samples: Sequence[Sample], folder: Path, name: str) -> dict[str, str]:
    """Masks in a folder below that of the labels, by the samples' keys."""
    for dropped in (0, 1):
        names = {sample.key: "/".join(sample.key.split("/")[dropped:]) for sample in samples}
        found = {key: path for key, below in names.items()
                 if (path := _mask_file(folder / name, below)) is not None}
        if len(set(found.values())) < len(found):
            raise UserError(f"--pseudo-labels {folder}: images of several folders share a mask there; keep "
                            "the folders of the data root below it")
        if found:
            return found
    return {}


def _mask_file(folder: Path, name: str) -> str | None:
    """The PNG of this name, its accents and its extension written in any form.

    Raises:
        UserError: there are two: people save a mended mask beside the old one.
    """
    forms = dict.fromkeys(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    paths = [str(folder / f"{form}{ending}") for form in (name, *forms) for ending in (".png", ".PNG")]
    # A file system may take several of these names for one file.
    there = {(status.st_dev, status.st_ino): path for path in reversed(paths)
             if (status := _status(path)) is not None}
    if len(there) > 1:
        first, second = sorted(there.values())
        raise UserError(f"--pseudo-labels: {first} and {second} are masks of one image; remove the old one")
    return next(iter(there.values()), None)


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
