"""Split files: lists of labelled, unlabelled and validation images, in the format of ST++ and its successors.

One sample per line, `image [mask]`, with paths relative to the data root (see stpp.dataset.unlabelled_folders
for images elsewhere); public files load unchanged. Names may contain spaces: a line is tried as a whole image
path, then cut at every blank in turn, against the index.

A labelled line needs a mask: the one it names, otherwise the index's own. A named mask must be the index's
mask of that image, because only that one has been checked; the names in the public lists and in the original
data sets (`SegmentationClass/` and `SegmentationClassAug/`, `_labelTrainIds.png` and `_labelIds.png`) count
as equal. An unlabelled line needs no mask; a named mask that does not exist is ignored with a warning, and a
mask in the index is used only to report the quality of pseudo labels.
"""

import math
import os
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from stpp import files
from stpp.dataset import official
from stpp.dataset.entries import Entry, Index
from stpp.dataset.notes import Notes, counted
from stpp.errors import UserError
from stpp.loading.sample import Sample

LABELED, UNLABELED, VAL = "labeled.txt", "unlabeled.txt", "val.txt"
_SAME = (("SegmentationClass/", "SegmentationClassAug/"),
         ("_gtFine_labelTrainIds.png", "_gtFine_labelIds.png"))

_DRAW_LABELED, _DRAW_VAL, _DRAW_HELD = 1, 2, 3
"""Second words of the generator's key: each draw has its own random stream."""


def read_split(path: str | os.PathLike, index: Index, *, labelled: bool,
               notes: Notes | None = None) -> list[Sample]:
    """Reads a split file; returns samples in line order.

    Args:
        path: the file, UTF-8, or UTF-16 with a byte order mark.
        index: the data set.
        labelled: require a mask on every line. If False, `Sample.mask` is the data set's own mask, if any:
            for reports, never for training.
        notes: collects warnings.

    Raises:
        UserError: the file is missing, not text or empty; a line names a file that is not in the index or
            outside the root; a labelled line has no mask. Names file and line.
    """
    path, notes = Path(path), notes or Notes()
    try:
        lines = files.read_text(path).split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such split file; write one with `stpp split`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a list of images ({error})") from error
    first_line: dict[str, int] = {}
    samples, unknown, repeated = [], [], []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{path}, line {number}"
        entry, mask = _resolved(text, index, where, labelled)
        if mask is not None and not labelled and not _same_path(mask, entry.mask):
            unknown.append((number, mask))
        if entry.mask is None and labelled:
            named = f"the mask {mask} is not in the index" if mask else "has no mask"
            raise UserError(f"{where}: {entry.image}: {named}, and a labelled image needs one; check the "
                            "masks pattern")
        if first_line.setdefault(entry.image, number) != number:
            repeated.append(f"line {number} repeats line {first_line[entry.image]}")
            continue
        samples.append(index.sample(entry.image))
    if not samples:
        raise UserError(f"{path}: lists no image; expected one 'image [mask]' per line")
    if unknown:
        number, mask = unknown[0]
        notes.warn(f"{path}: ignoring {len(unknown)} masks of unlabelled images that are not in the index "
                   f"(line {number}: {mask})")
    if repeated:
        notes.warn(f"{path}: skipping {len(repeated)} lines that repeat an image ({repeated[0]})")
    return samples


def _resolved(line_text: str, index: Index, where: str, labelled: bool) -> tuple[Entry, str | None]:
    """Image of a line, and the mask as the line names it, or None.

    Among several ways to cut the line, the one with the index's mask wins, then the one with the longest
    image.
    """
    best = None
    for text in dict.fromkeys((line_text, line_text.strip())):
        entry = index.find(_tidy(text))
        if entry is not None:
            return entry, None
        for cut in range(len(text) - 1, 0, -1):
            if text[cut] not in " \t":
                continue
            entry = index.find(_tidy(text[:cut]))
            if entry is None:
                continue
            mask = _tidy(text[cut + 1 :])
            if not mask.strip():
                return entry, None
            if entry.mask is not None and _same_path(mask, entry.mask):
                return entry, mask
            best = best or (entry, mask)
    if best is None:
        raise _unknown(line_text.strip(), index, where)
    entry, mask = best
    _refuse_leaving(mask, where)
    if labelled and entry.mask is not None:
        raise UserError(
            f"{where}: {mask} is not the index's mask of {entry.image}, {entry.mask}; check the masks "
            "pattern"
        )
    return best


def _unknown(text: str, index: Index, where: str) -> UserError:
    """Error for a line without any beginning that is an image of the index."""
    _refuse_leaving(text, where)
    for word in dict.fromkeys((text, text.rsplit(None, 1)[0], text.split()[0])):
        if os.path.isfile(index.place(word) / word):
            return UserError(
                f"{where}: {word} exists but is not an image of the index; check the images pattern and "
                "--data.layout"
            )
    return UserError(f"{where}: {text}: no such image under {index.place(text)}; paths are relative to the "
                     "data root")


def _refuse_leaving(text: str, where: str) -> None:
    words = text.replace("\\", "/").split()
    if any(word.startswith("/") or word[1:3] == ":/" or ".." in word.split("/") for word in words):
        raise UserError(f"{where}: {text}: paths must be relative to the data root, without '..'")


def _tidy(path: str) -> str:
    return path[2:] if path.startswith("./") else path


def _same_path(listed_path: str, index_path: str | None) -> bool:
    """True if a list's mask is the index's."""
    if index_path is None:
        return False
    listed_path, index_path = (
        unicodedata.normalize("NFC", path) for path in (listed_path.strip(), index_path)
    )
    return listed_path == index_path or any(
        listed_path.replace(public, own) == index_path for public, own in _SAME
    )


def find_val(folder: str | os.PathLike) -> Path:
    """Path of the validation list of a user's split: in its folder or, as for public lists, one or two levels
    above; `folder / VAL` if there is none."""
    folder = Path(folder)
    above = (folder, *folder.absolute().parents[:2])
    return next((path / VAL for path in above if (path / VAL).is_file()), folder / VAL)


def make_split(
    index: Index, out_dir: str | os.PathLike, *, fraction: str = "1/8", seed: int = 0,
    val: float | None = None, notes: Notes | None = None, replace: bool = False,
) -> None:
    """Draws a split and writes labeled.txt, unlabeled.txt and, if there is validation, val.txt.

    The draw is uniform over the images with a mask, depends only on their names, `seed`, `fraction` and
    `val`, and is nested: the labelled images of 1/16 are among those of 1/8. All other images become
    unlabelled, with or without a mask.

    Validation is the official one if it exists (see stpp.dataset.official). Otherwise, or if `val` is given,
    `val` times the other images with masks are drawn; without either there is no validation. Official
    validation images are never trained on; with `val` they are, like test images, in no list. Training copies
    of validation images cause a warning.

    Args:
        index: the data set.
        out_dir: folder of the lists.
        fraction: labelled fraction, "1/8" or "0.125" (rounded up), or a number of images, "92".
        seed: random seed of the draw.
        val: fraction of the images with masks, the official validation excepted, for validation in its place;
            0 < val < 1.
        notes: collects messages.
        replace: replace lists of another draw in the folder.

    Raises:
        UserError: other lists in the folder, without `replace`; invalid fraction, seed or val, no image with
            a mask, or unwritable lists.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: must be an integer from 0 to 2**64 - 1")
    if val is not None and not 0 < val < 1:
        raise UserError(f"--val {val}: must be between 0 and 1, such as 0.1")
    notes = notes or Notes()
    official.say(index, notes)
    quiet = Notes(quiet=True)  # already reported
    validation, test = official.validation(index, quiet), official.test(index, quiet)
    pool = [image for image in sorted(index.entries) if image not in test and image not in validation]
    if val is None:
        validation = {image for image in validation if index.entries[image].mask is not None}
    else:
        with_mask = [image for image in pool if index.entries[image].mask is not None]
        if validation:
            drawn_from = counted(len(with_mask), "training image")
            notes.line(f"--data.val {val}: validation is drawn from {drawn_from} with a mask; the "
                       "official validation is in no list")
        validation = set(_drawn(with_mask, max(1, math.floor(val * len(with_mask) + 0.5)), seed, _DRAW_VAL))
        pool = [image for image in pool if image not in validation]
    _warn_of_copies(pool, validation, index, notes)
    with_mask = [image for image in pool if index.entries[image].mask is not None]
    if not with_mask:
        raise UserError(f"{index.root}: no training image has a mask; check the masks pattern")
    labelled = set(_drawn(with_mask, _count(fraction, len(with_mask)), seed, _DRAW_LABELED))

    lists = {
        LABELED: [image for image in with_mask if image in labelled],
        UNLABELED: [image for image in pool if image not in labelled],
        VAL: sorted(validation),
    }
    texts = {name: "".join(line(index.entries[image]) for image in images) for name, images in lists.items()}
    if not replace:
        _refuse_other(Path(out_dir), texts)
    _write(Path(out_dir), texts)
    _warn_missing(index, lists[LABELED], notes)


def _warn_of_copies(pool: list[str], validation: set[str], index: Index, notes: Notes) -> None:
    """Warns of images of `pool`, which are trained on, that are copies of validation images."""
    copied = {index.twins[image]: image for image in sorted(validation) if image in index.twins}
    leaks = [image for image in pool if index.twins.get(image) in copied]
    if leaks:
        notes.warn(f"training images that are copies of validation images: {counted(len(leaks), 'image')}, "
                   f"for example {leaks[0]} of {copied[index.twins[leaks[0]]]}; the mIoU will be too high: "
                   "remove the copies")


def _refuse_other(folder: Path, texts: dict[str, str]) -> None:
    """Rejects a folder with lists of the same names and other lines."""
    for name, text in texts.items():
        path = folder / name
        try:
            if path.exists() and path.read_bytes() != text.encode():
                raise UserError(f"{path}: is another list, which would be replaced; choose another --out, or "
                                "remove it")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        for name, text in texts.items():
            if text or name != VAL:
                files.write_text(folder / name, text)
            else:
                # A list of an earlier draw would be mistaken for this draw's.
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: the lists cannot be written ({error.strerror or error})") from error


def _count(fraction: str, total: int) -> int:
    """Number of labelled images given by "1/8", "0.125" or "92" for `total` images with masks."""
    text = str(fraction).strip()
    problem = (
        f"--fraction {fraction}: must be a fraction such as 1/8 or 0.125, at most 1/1, or a number of images "
        "such as 92"
    )
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(problem) from error
    if text.isdecimal():
        if not 1 <= value <= total:
            raise UserError(f"--fraction {fraction}: only {total} images have masks; give a number from 1 to "
                            f"{total}")
        return int(value)
    if not 0 < value <= 1:
        raise UserError(problem)
    return math.ceil(value * total)


def _drawn(images: list[str], count: int, seed: int, purpose: int) -> list[str]:
    """Uniform draw of `count` of the sorted `images`: those with the smallest random 64-bit numbers."""
    numbers = np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)).random_raw(len(images))
    return [images[i] for i in np.argsort(numbers, kind="stable")[:count]]


def held_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits labelled samples into training samples and a held-out share (rounded up), drawn by name and
    `seed`; order is kept.

    Raises:
        UserError: no training sample would be left.
    """
    count = math.ceil(share * len(samples))
    if count >= len(samples):
        raise UserError(f"--advise.share {share} leaves no labelled image of {len(samples)} to train on; "
                        "lower it")
    kept = set(_drawn(sorted(sample.image for sample in samples), count, seed, _DRAW_HELD))
    return ([sample for sample in samples if sample.image not in kept],
            [sample for sample in samples if sample.image in kept])


def line(entry: Entry) -> str:
    """Line of a split file for an image, with its line break."""
    return f"{entry.image} {entry.mask}\n" if entry.mask is not None else f"{entry.image}\n"


def _warn_missing(index: Index, labelled: list[str], notes: Notes) -> None:
    pixels = np.zeros(len(index.classes), dtype=np.int64)
    everywhere = np.zeros(len(index.classes), dtype=np.int64)
    drawn = set(labelled)
    for image, entry in index.entries.items():
        if entry.class_pixels is not None:
            everywhere += np.asarray(entry.class_pixels)
            if image in drawn:
                pixels += np.asarray(entry.class_pixels)
    missing = [name for name, count in zip(index.classes, pixels, strict=True) if not count]
    if missing:
        elsewhere = bool(((pixels == 0) & (everywhere > 0)).any())
        advice = ("try another seed or a larger fraction" if elsewhere else
                  "no mask of the data set has any: check its ids")
        notes.warn(f"the {len(labelled)} labelled images hold no pixel of: {', '.join(missing)}; {advice}")
