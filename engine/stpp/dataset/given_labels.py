"""Pseudo labels from a folder: masks of `stpp label` or of a run, reviewed and possibly corrected by a
person.

They are read and checked like the masks of a data set before training.
"""

import dataclasses
import json
import os
import stat
import unicodedata
from collections import Counter
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
    """Finds and checks the masks of samples, and writes the list of them to `out`.

    An image's mask is the PNG in `folder`, or in its `masks`, with the image's path below the data root, or
    below its first folder (`stpp label --source DATA/photos` omits `photos`). CVAT masks in
    `SegmentationClass`, with a `labelmap.txt` that maps their colours, take precedence, so an export of
    corrected masks can be unpacked into the labels' folder. Samples without a mask are dropped.

    Args:
        samples: unlabelled images.
        folder: folder of the masks.
        index: the index of their data set.
        out: folder for the list and for re-encoded masks.
        exclude: list of images to drop, with lines as in a split.
        began: training has begun on an earlier list; a different one is rejected.

    Raises:
        UserError: missing folder, no mask for any sample, a mask that is broken, of another size or with ids
            outside the class list, a list with unknown images, or masks that changed.
    """
    if not folder.is_dir():
        raise UserError(f"--pseudo-labels {folder}: no such folder")
    excluded = {sample.key
                for sample in splits.read_split(exclude, index, labelled=False)} if exclude else set()
    candidates = [sample for sample in samples if sample.key not in excluded]
    keys = [entry.key for entry in index.entries.values()]
    corrected, others = _find_masks(candidates, folder.absolute(), keys)
    mask_files = others | corrected
    stamps = {}
    for key, path in mask_files.items():
        status = os.stat(path)
        stamps[key] = [path, status.st_size, status.st_mtime_ns]
    if began:  # checked before training began
        if _read(out)["stamps"] != stamps:
            raise UserError(f"--pseudo-labels {folder}: masks or excluded images changed since this run "
                            "began; choose another --out")
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
        more = f" (and {len(problems) - 1} more masks)" if len(problems) > 1 else ""
        raise UserError(f"--pseudo-labels: {problems[0]}{more}; fix them, or list their images in --exclude")
    os.sync()  # re-encoded masks are plain writes: they must be on disk before the list exists
    files.write_json(out / NAME, {"masks": masks, "stamps": stamps, "class_pixels": pixels})


def _checked(tasks: list[Task], index: Index, out: Path,
             meaning: MaskMap | None) -> tuple[dict[str, str], list[str], list[int]]:
    """(training masks by key, problems, pixels per class) of the tasks' masks."""
    masks, problems, judge = {}, [], Judge(index.classes, meaning)
    pixels = [0] * len(index.classes)
    for chunk in check_all(tasks, (str(index.root), str(out), len(index.classes), index.exif, meaning)):
        for checked in chunk:
            problems += checked.problems
            masks[checked.task.key] = str(out / checked.converted) if checked.converted else checked.task.mask
            if checked.class_pixels is not None:
                pixels = [a + b for a, b in zip(pixels, checked.class_pixels, strict=True)]
                judge.add(checked.task.mask, checked.stored, [*checked.class_pixels, checked.ignored],
                          checked.edges)
    # Only storage problems: teachers leave specks, and 255 where they are uncertain.
    return masks, problems + judge.stored_problems(), pixels


def attach(samples: Sequence[Sample], out: Path) -> list[Sample]:
    """Samples with a mask in the list written by `check`, with that mask, to be strongly augmented."""
    masks = _read(out)["masks"]
    return [dataclasses.replace(sample, mask=masks[sample.key], strong=True) for sample in samples
            if sample.key in masks]


def _read(out: Path) -> dict:
    try:
        return json.loads((out / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out / NAME}: cannot be read ({error}); choose another --out") from error


def _meaning(folder: Path, classes: Sequence[str]) -> MaskMap:
    """Mask map of CVAT's colours."""
    return mask_map.parse(legends.of_colours(folder, cvat.labels_in(folder), classes), classes)


def _find_masks(samples: Sequence[Sample], folder: Path,
                all_keys: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Mask files by sample key: (CVAT masks, other masks).

    Args:
        all_keys: keys of all images of the data set, which may own a mask too.
    """
    places = [folder / "masks", folder]
    corrected = (_below(samples, folder / "SegmentationClass", all_keys)
                 if cvat.labels_in(folder) is not None else {})
    rest = [sample for sample in samples if sample.key not in corrected]
    others = next(filter(None, (_below(rest, place, all_keys) for place in places)), {})
    if corrected or others:
        return corrected, others
    example = f"{samples[0].key}.png" if samples else "the images that are not excluded"
    raise UserError(f"--pseudo-labels {folder}: contains no mask of an unlabelled image; looked for "
                    f"{example}")


def _below(samples: Sequence[Sample], folder: Path, all_keys: Sequence[str]) -> dict[str, str]:
    """Masks in a folder, by sample key."""
    for dropped in (0, 1):
        names = {key: unicodedata.normalize("NFC", "/".join(key.split("/")[dropped:])) for key in all_keys}
        mask_files = {sample.key: path for sample in samples
                      if (path := _mask_file(folder, names[sample.key])) is not None}
        owners = Counter(names.values())
        if shared := next((names[key] for key in mask_files if owners[names[key]] > 1), None):
            raise UserError(f"--pseudo-labels {folder}: images of several folders share a mask, "
                            f"{shared}.png; keep the folders of the data root in it")
        if mask_files:
            return mask_files
    return {}


def _mask_file(folder: Path, name: str) -> str | None:
    """PNG with this name, in any Unicode normalisation and case of its extension.

    Raises:
        UserError: there are two, such as a corrected mask next to the old one.
    """
    forms = dict.fromkeys(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    paths = [str(folder / f"{form}{ending}") for form in (name, *forms) for ending in (".png", ".PNG")]
    # On some file systems, several of these names are one file.
    path_of = {(status.st_dev, status.st_ino): path for path in reversed(paths)
             if (status := _status(path)) is not None}
    if len(path_of) > 1:
        first, second = sorted(path_of.values())
        raise UserError(f"--pseudo-labels: {first} and {second} are masks of one image; remove the old one")
    return next(iter(path_of.values()), None)


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
