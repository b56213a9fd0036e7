"""Which image belongs to which mask: the folder layouts that data sets come in.

`voc`: `JPEGImages/**` and `SegmentationClassAug/**.png`, or, where there is no such folder, `SegmentationClass/**.png`.
`cityscapes`: `leftImg8bit/**/*_leftImg8bit.png` and `gtFine/**/*_gtFine_labelTrainIds.png`; or, where the original masks
are more, `*_gtFine_labelIds.png`, whose ids are then mapped.
`camvid`: `images/{train,val,...}/**` and `masks/<the same relative path>.png`.
`globs`: two patterns, such as `photos/**/*.jpg` and `labels/**/*_mask.png`. An image and a mask belong together when
what is left of their paths is equal, once the pattern's fixed folders and its fixed ending (`.jpg`, `_mask.png`) are
taken away. Between wildcards too, if both patterns have fixed folders there: `*/photos/**/*` and `*/labels/**/*.png` pair
`a/photos/1.jpg` with `a/labels/1.png`.

All paths here are relative to the root, with forward slashes. Hidden files are passed over; extensions match in any
case.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from stpp import log
from stpp.dataset import cityscapes
from stpp.errors import UserError
from stpp.images.image_file import IMAGE_EXTENSIONS

LAYOUTS = ("auto", "voc", "cityscapes", "camvid", "globs")

_VOC = ("JPEGImages", "SegmentationClass")
_VOC_AUGMENTED = "SegmentationClassAug"
_CAMVID = ("images", "masks")
_UNLISTABLE = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of line breaks, control characters and undecodable bytes: no split file can hold such a name."""


@dataclass(frozen=True, slots=True)
class Found:
    """An image of a data set."""

    key: str
    """The image's path without its extension."""
    image: str
    mask: str | None


@dataclass(frozen=True, slots=True)
class _Side:
    """Where images, or masks, are looked for."""

    prefix: str
    """Folder below the root; "" is the root itself."""
    pattern: re.Pattern | None
    """What a path below the prefix must match, its group 1 being the name, and the further ones the name without the fixed
    folders between wildcards; None: anything."""
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS


def checked_root(root: str | os.PathLike, flag: str = "--data.root") -> Path:
    """The data root, or what another flag gives, absolute and without links.

    Raises:
        UserError: it does not exist or is not a folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{flag} {path}: {what}; give the folder that holds the images")
    return path.resolve()


def resolve(root: str | os.PathLike, layout: str, images: str | None = None, masks: str | None = None) -> str:
    """The name of the layout that `layout` stands for: for "auto", the one whose folders are there.

    Raises:
        UserError: unknown layout, missing root, a pattern that is missing, or no layout fits.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--data.layout {layout}: unknown; allowed: {', '.join(LAYOUTS)}")
    path = checked_root(root)
    if layout == "globs" and not images:
        raise UserError("--data.layout globs: needs --data.images, a pattern such as 'photos/**/*.jpg'")
    if images and layout in ("voc", "cityscapes", "camvid"):
        raise UserError(f"--data.images {images}: goes with --data.layout globs, not {layout}")
    if layout != "auto":
        return layout
    if images:
        return "globs"
    for name, folder in (("voc", "JPEGImages"), ("cityscapes", "leftImg8bit"), ("camvid", "images")):
        if (path / folder).is_dir():
            return name
    raise UserError(
        f"--data.root {path}: no known layout: neither JPEGImages/ (voc), leftImg8bit/ (cityscapes) nor images/ (camvid) is there; "
        "give --data.images and --data.masks, patterns such as 'photos/**/*.jpg' and 'labels/**/*.png'"
    )


def own_masks(root: str | os.PathLike, layout: str) -> str | None:
    """The pattern of the masks that a resolved layout finds in this root; None: the first that the layout is known for."""
    root = checked_root(root)
    if layout == "voc" and (root / _VOC_AUGMENTED).is_dir():
        return f"{_VOC_AUGMENTED}/**/*.png"
    if layout == "cityscapes":
        names = list(_walk(root, "gtFine", None))
        train_ids, label_ids = (
            sum(name.endswith(ending) for name in names)
            for ending in (cityscapes.TRAIN_IDS_ENDING, cityscapes.LABEL_IDS_ENDING)
        )
        return cityscapes.LABEL_IDS if label_ids > train_ids else None
    return None


def own_mask_map(layout: str, masks: str | None) -> tuple[str, ...]:
    """What the ids in the masks of a resolved layout mean, if they are not class ids: see stpp.dataset.mask_map."""
    return cityscapes.LABEL_IDS_MAP if layout == "cityscapes" and (masks or "").endswith("_labelIds.png") else ()


def folders(layout: str, images: str | None = None, masks: str | None = None) -> list[str]:
    """The fixed folders in which a resolved layout looks; "" is the root."""
    return [side.prefix for side in _sides(layout, images, masks) if side]


def find(
    root: str | os.PathLike,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    *,
    exclude: str | os.PathLike | None = None,
    flag: str = "--data.root",
) -> list[Found]:
    """Lists the images of a data set, sorted by path, each with its mask if it has one; says if masks are left over.

    Args:
        root: the data root.
        layout: one of `LAYOUTS`.
        images: pattern of images for "globs".
        masks: pattern of masks; for the other layouts it replaces their own.
        exclude: a folder not to enter.
        flag: what gave the root.

    Raises:
        UserError: missing root, no layout fits, no image found, two images or two masks of one name, masks of which
            none belongs to an image, a path or a link that leaves the root, a name that no list file could hold.
    """
    path = checked_root(root)
    layout = resolve(path, layout, images, masks)
    images, masks = cityscapes.IMAGES if layout == "cityscapes" else images, masks or own_masks(path, layout)
    image_side, mask_side = _sides(layout, images, masks)
    skip = Path(exclude).resolve() if exclude is not None else None

    patterns = [side.pattern for side in (image_side, mask_side) if side and side.pattern]
    alike = len(patterns) == 2 and patterns[0].groups == patterns[1].groups
    mask_of = dict(_named(path, mask_side, skip, "masks", alike)) if mask_side else {}
    found, keys, matched = [], {}, 0
    for name, image in _named(path, image_side, skip, "images", alike):
        key = os.path.splitext(image)[0]
        if keys.setdefault(key, image) != image:
            raise UserError(f"{path}: duplicate key {key}: {keys[key]} and {image}; rename or remove one")
        mask = mask_of.pop(name, None)
        matched += mask is not None
        found.append(Found(key, image, mask))
    if not found:
        looked = images or f"{image_side.prefix}/** ({' '.join(IMAGE_EXTENSIONS)})"
        raise UserError(f"{flag} {path}: no image found; looked for {looked}")
    if mask_of and not matched:
        mask = next(iter(mask_of.values()))
        raise UserError(
            f"{path}: no mask belongs to an image: for example {mask}, while images are named as {found[0].image}"
        )
    if masks and not mask_of and not matched:
        raise UserError(f"--data.masks {masks}: no file matches it under {path}")
    if mask_of:
        log.say(f"warning: {path}: masks that belong to no image: {len(mask_of)}, for example {next(iter(mask_of.values()))}")
    return sorted(found, key=lambda one: one.image)


def _sides(layout: str, images: str | None, masks: str | None) -> tuple[_Side, _Side | None]:
    if layout == "cityscapes":
        images, masks = cityscapes.IMAGES, masks or cityscapes.TRAIN_IDS
    if images:
        return _parsed(images, "images"), _parsed(masks, "masks") if masks else None
    image_folder, mask_folder = _VOC if layout == "voc" else _CAMVID
    if masks:
        return _Side(image_folder, None), _parsed(masks, "masks")
    return _Side(image_folder, None), _Side(mask_folder, None, (".png",))


def _parsed(pattern: str, flag: str) -> _Side:
    """Splits a pattern into fixed folders and a regular expression whose group 1 is the name that pairs images with
    masks."""
    parts = pattern.replace("\\", "/").split("/")
    if pattern.startswith(("/", "~")) or ".." in parts or not parts[-1]:
        raise UserError(f"--data.{flag} {pattern}: must be a pattern of files below the data root, without '..'")
    parts = [part for part in parts if part != "."]
    fixed = 0
    while fixed < len(parts) - 1 and not set(parts[fixed]) & set("*?["):
        fixed += 1
    rest = "/".join(parts[fixed:])
    wild = max(rest.rfind(c) for c in "*?]")
    if wild < 0:
        raise UserError(f"--data.{flag} {pattern}: has no '*'; give a pattern such as 'photos/**/*.jpg'")
    ending = rest[wild + 1 :]
    # A pattern that ends in a wildcard, such as photos/*, pairs by the name without extension.
    tail = re.escape(ending) if ending else r"(?:\.[^./]*)?"
    lazy = "?" if not ending and rest.endswith("*") else ""
    runs = groupby(rest[: wild + 1].split("/"), key=lambda part: bool(set(part) & set("*?[")))
    *before, (_, last) = [(is_wild, "/".join(run)) for is_wild, run in runs]
    folders = "".join(f"({_expression(run + '/')})" if is_wild else re.escape(run + "/") for is_wild, run in before)
    expression = re.compile(f"({folders}({_expression(last)}{lazy})){tail}", re.IGNORECASE | re.DOTALL)
    extensions = ("",) if ending else IMAGE_EXTENSIONS if flag == "images" else (".png",)
    return _Side("/".join(parts[:fixed]), expression, extensions)


def _expression(glob: str) -> str:
    """A glob as a regular expression: `**/` any folders or none, `*` and `?` inside a name, `[...]` a set."""
    out, i = [], 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out.append("(?:[^/]+/)*")
            i += 3
        elif glob.startswith("**", i):
            out.append(".*")
            i += 2
        elif glob[i] == "*":
            out.append("[^/]*")
            i += 1
        elif glob[i] == "?":
            out.append("[^/]")
            i += 1
        elif glob[i] == "[" and (end := glob.find("]", i + 2)) > 0:
            inside = glob[i + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out.append(f"[{'^' + inside[1:] if inside[0] == '!' else inside}]")
            i = end + 1
        else:
            out.append(re.escape(glob[i]))
            i += 1
    return "".join(out)


def _named(root: Path, side: _Side, skip: Path | None, what: str, alike: bool) -> Iterator[tuple[str, str]]:
    """(pairing name, path) of the files of a side, refusing masks of equal name.

    Args:
        alike: both patterns have as many fixed folders between wildcards, which are then no part of the name.
    """
    seen: dict[str, str] = {}
    for path in _walk(root, side.prefix, skip):
        below = path[len(side.prefix) + 1 :] if side.prefix else path
        if not below.lower().endswith(side.extensions):
            continue
        if side.pattern is None:
            stem = os.path.splitext(below)[0]
        else:
            match = side.pattern.fullmatch(below)
            if not match:
                continue
            stem = "/".join(match.groups()[1:]) if alike else match[1]
        # Accents may be one code point or two: systems differ, so that an image and its mask can differ too.
        name = unicodedata.normalize("NFC", stem)
        if name in seen:
            raise UserError(f"{root}: duplicate key {name} of {what}: {seen[name]} and {path}; rename or remove one")
        seen[name] = path
        yield name, path


def _walk(root: Path, prefix: str, skip: Path | None) -> Iterator[str]:
    """Relative paths of all files below root/prefix; links are followed as long as they stay inside the root."""
    top = os.path.join(root, prefix)
    if prefix:
        _inside(root, Path(top))
    if not os.path.isdir(top):
        return
    # The real folders on the way down: a link back to one of them would never end.
    pending = [(top, prefix, (os.path.realpath(top),))]
    while pending:
        folder, relative, above = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            path = f"{relative}/{entry.name}" if relative else entry.name
            if not entry.name.isprintable() and any(unicodedata.category(c) in _UNLISTABLE for c in entry.name):
                raise UserError(
                    f"{root}: the name {path!r} holds a line break, a control character or bytes that are not UTF-8; "
                    "rename it"
                )
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if entry.is_symlink():
                _inside(root, Path(entry.path))
            if entry.is_dir():
                if real not in above and (skip is None or Path(real) != skip):
                    pending.append((entry.path, path, (*above, real)))
            else:
                yield path


def _inside(root: Path, path: Path) -> None:
    """Refuses a path whose links lead out of the root."""
    target = path.resolve()
    if target != root and root not in target.parents:
        raise UserError(
            f"{path}: is a link to {target}, outside {root}, the folder that was given; put the files inside, or give that folder"
        )


def listing(root: Path, found: list[Found]) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, mtime_ns) of every image and mask; (path, -1, -1) for what is no readable file."""
    for one in found:
        for path in (one.image, one.mask):
            if path is not None:
                try:
                    status = os.stat(root / path)
                except OSError:
                    yield path, -1, -1
                    continue
                regular = stat.S_ISREG(status.st_mode)
                yield path, (status.st_size if regular else -1), (status.st_mtime_ns if regular else -1)
