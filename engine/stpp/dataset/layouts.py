"""Folder layouts of data sets: the pairing of images with masks.

`voc`: `JPEGImages/**` and `SegmentationClassAug/**.png`, or, without that folder,
`SegmentationClass/**.png`.
`cityscapes`: `leftImg8bit/**/*_leftImg8bit.png` and `gtFine/**/*_gtFine_labelTrainIds.png`; or, if there are
more original masks, `*_gtFine_labelIds.png`, whose ids are then mapped.
`cvat`: VOC's folders, and `labelmap.txt`, which maps the masks' colours to labels.
`camvid`: `images/{train,val,...}/**` and `masks/<the same relative path>.png`.
`globs`: two patterns, such as `photos/**/*.jpg` and `labels/**/*_mask.png`. An image and a mask are paired if
their paths are equal without the patterns' fixed folders and fixed ending (`.jpg`, `_mask.png`), and without
fixed folders between wildcards if both patterns have them: `*/photos/**/*` and `*/labels/**/*.png` pair
`a/photos/1.jpg` with `a/labels/1.png`.

`coco`, `yolo`, `labelme`: masks are drawn from shapes; see stpp.dataset.drawn.

All paths here are relative to the root, with forward slashes. Hidden files, system files, and masks among the
images are skipped and counted; extensions match in any case.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from stpp.annotations import cvat
from stpp.dataset import cityscapes, drawn, legends
from stpp.dataset.classes import ClassList, counts_nowhere
from stpp.dataset.notes import Notes, counted
from stpp.dataset.patterns import Side, parsed
from stpp.dataset.search import FoundImage, Search
from stpp.dataset.walk import walk
from stpp.errors import UserError
from stpp.images.folders import SkippedFiles, folders_of, image_of_mask, image_of_mask_in_folder
from stpp.images.image_file import IMAGE_EXTENSIONS

LAYOUTS = ("auto", "voc", "cvat", "cityscapes", "camvid", "globs", *drawn.FORMATS)

_VOC = ("JPEGImages", "SegmentationClass")
_VOC_AUGMENTED = "SegmentationClassAug"
VOC_AUGMENTED_MASKS = f"{_VOC_AUGMENTED}/**/*.png"
"""Masks of a VOC root with augmented masks; missing ones are taken from SegmentationClass."""
_CAMVID = ("images", "masks")


def checked_root(root: str | os.PathLike, flag: str = "--data.root") -> Path:
    """Resolved data root, or the resolved folder of another flag.

    Raises:
        UserError: it does not exist or is not a folder.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{flag} {path}: {problem}; give the folder that holds the images")
    return path.resolve()


def resolve(root: str | os.PathLike, layout: str, images: str | None = None) -> str:
    """Name of the layout; "auto" selects the one whose folders exist.

    Raises:
        UserError: unknown layout, missing root, missing pattern, or no matching layout.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--data.layout {layout}: unknown; allowed: {', '.join(LAYOUTS)}")
    path = checked_root(root)
    if layout == "globs" and not images:
        raise UserError("--data.layout globs: needs --data.images, a pattern such as 'photos/**/*.jpg'")
    if images and layout in ("voc", "cityscapes", "camvid"):
        raise UserError(f"--data.images {images}: needs --data.layout globs, not {layout}")
    if layout == "cvat" and cvat.labels_in(path) is None:
        raise UserError(f"--data.layout cvat: {path / cvat.LABELMAP} is missing or has no colours")
    if layout != "auto":
        return layout
    if images:
        return "globs"
    if (path / _VOC[1]).is_dir() and cvat.labels_in(path) is not None:
        return "cvat"
    for name, folder in (("voc", "JPEGImages"), ("cityscapes", "leftImg8bit"), ("camvid", "images")):
        if (path / folder).is_dir():
            return name
    raise UserError(
        f"--data.root {path}: no known layout: neither JPEGImages/ (voc), leftImg8bit/ (cityscapes) nor "
        "images/ (camvid) exists; give --data.images and --data.masks, patterns such as 'photos/**/*.jpg' "
        "and 'labels/**/*.png'"
    )


def own_classes(root: Path, layout: str) -> ClassList | None:
    """Class names of the cvat layout's labelmap; None for other layouts."""
    if layout != "cvat":
        return None
    names = [label.name for label in cvat.labels_in(root) if not counts_nowhere(label.name)]
    return ClassList(names, str(root / cvat.LABELMAP))


def own_masks(root: str | os.PathLike, layout: str, *, follow_links: bool = False) -> str | None:
    """Mask pattern that a resolved layout uses in this root; None: the layout's default pattern."""
    root = checked_root(root)
    if layout == "voc" and (root / _VOC_AUGMENTED).is_dir():
        return VOC_AUGMENTED_MASKS
    if layout == "cityscapes":
        names = list(walk(root, "gtFine", follow_links=follow_links))
        train_ids, label_ids = (
            sum(name.endswith(ending) for name in names)
            for ending in (cityscapes.TRAIN_IDS_ENDING, cityscapes.LABEL_IDS_ENDING)
        )
        return cityscapes.LABEL_IDS if label_ids > train_ids else None
    return None


def own_mask_map(root: Path, layout: str, masks: str | None, classes: Sequence[str]) -> tuple[str, ...]:
    """Mask map of a resolved layout whose masks hold other ids or colours, see stpp.dataset.mask_map; else
    empty.

    Raises:
        UserError: a labelmap's label is not a class.
    """
    if layout == "cityscapes" and (masks or "").endswith("_labelIds.png"):
        return cityscapes.LABEL_IDS_MAP
    return legends.of_colours(root, cvat.labels_in(root), classes) if layout == "cvat" else ()


def _refuse_folders_like_masks(keys: Mapping[str, str], root: Path) -> None:
    """Rejects a folder `a/7.png` beside the image `a/7.jpg`, whose mask would be written to this name."""
    folders_in = folders_of(keys)
    for key, image in keys.items():
        folder, _, name = key.rpartition("/")
        if f"{name}.png" in folders_in(folder):
            raise UserError(f"{root}: the folder {key}.png has the name of the mask of {image}; rename one")


def folders(layout: str, images: str | None = None, masks: str | None = None) -> list[str]:
    """Fixed folders that a resolved layout searches; "" is the root."""
    return [side.prefix for side in _sides(layout, images, masks, None) if side]


def find(
    root: str | os.PathLike,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    *,
    exclude: str | os.PathLike | None = None,
    flag: str = "--data.root",
    follow_links: bool = False,
    notes: Notes | None = None,
) -> list[FoundImage]:
    """Lists the images of a data set, sorted by path, each with its mask if any; reports skipped files.

    Args:
        root: the data root.
        layout: one of `LAYOUTS`.
        images: pattern of images for "globs".
        masks: pattern of masks; for the other layouts it replaces their own.
        exclude: a folder to skip.
        flag: the flag that set the root, for messages.
        follow_links: follow links out of the root.
        notes: collects messages.

    Raises:
        UserError: missing root, no matching layout, no image, two images or two masks of one name, masks
            without any matching image, a layout whose masks are elsewhere, a path or link that leaves the
            root, or a name that a list file cannot store.
    """
    path, notes = checked_root(root), notes or Notes()
    layout = resolve(path, layout, images)
    masks_flag, images_flag = masks, images
    images = cityscapes.IMAGES if layout == "cityscapes" else images
    is_drawn = layout in drawn.FORMATS
    masks = masks or own_masks(path, layout, follow_links=follow_links)
    image_side, mask_side = _sides(layout, images, masks, path)
    search = Search(path, Path(exclude).resolve() if exclude is not None else None, follow_links)

    patterns = [side.pattern for side in (image_side, mask_side) if side and side.pattern]
    have_equal_groups = len(patterns) == 2 and patterns[0].groups == patterns[1].groups
    mask_of = {}
    if mask_side:
        mask_of = dict(search.named_files(mask_side, "masks", have_equal_groups, SkippedFiles()))
    if layout == "voc" and masks == VOC_AUGMENTED_MASKS:
        mask_of = _with_original(search, mask_of, notes)
    skipped = SkippedFiles()
    image_of = dict(search.named_files(image_side, "images", have_equal_groups, skipped,
                                       apart=set(mask_of.values())))
    _leave_out_masks(image_of, mask_of, notes)
    if mask_side and not image_of.keys() & mask_of.keys():
        image_of, mask_of = image_side.without_lead(image_of), mask_side.without_lead(mask_of)
    shapes, listed = {}, {}
    if is_drawn and image_of:
        shapes, listed = drawn.match(search, layout, images_flag, masks_flag, image_of, notes)
    found_images, keys, num_paired = [], {}, 0
    for name, image in image_of.items():
        key = os.path.splitext(image)[0]
        if keys.setdefault(key, image) != image:
            raise UserError(f"{path}: duplicate key {key}: {keys[key]} and {image}; rename or remove one")
        mask = mask_of.pop(name, None)
        num_paired += mask is not None
        found_images.append(FoundImage(key, image, *shapes.get(image, (mask, None)), listed.get(image)))
    _refuse_folders_like_masks(keys, path)
    skipped.extensions.pop(drawn.ENDINGS.get(layout), None)
    _say_passed(skipped, notes)
    if not found_images:
        searched = images or f"{image_side.prefix}/** ({' '.join(IMAGE_EXTENSIONS)})"
        unread = f"; {skipped.lines()[0]}" if skipped.extensions else ""
        raise UserError(f"{flag} {path}: no image found; looked for {searched}{unread}")
    if mask_of and not num_paired:
        mask = next(iter(mask_of.values()))
        raise UserError(
            f"{path}: no mask belongs to an image: for example {mask}, while images are named like "
            f"{found_images[0].image}; give both equal names, or patterns that differ only in fixed "
            "folders, beginnings and endings, such as 'photos/**/*.jpg' and 'labels/**/*_mask.png'"
        )
    if is_drawn:
        return sorted(found_images, key=lambda image: image.image)
    if masks and not mask_of and not num_paired:
        raise UserError(f"--data.masks {masks}: no file matches it under {path}")
    if mask_of:
        notes.warn(
            f"{path}: masks that belong to no image: {len(mask_of)}, for example "
            f"{next(iter(mask_of.values()))}"
        )
    if not num_paired and not masks_flag and layout != "globs":
        _look_for_masks(search, layout, image_side.prefix, f"{mask_side.prefix}/", notes)
    return sorted(found_images, key=lambda image: image.image)


def _sides(layout: str, images: str | None, masks: str | None, root: Path | None) -> tuple[Side, Side | None]:
    if layout == "cityscapes":
        images, masks = cityscapes.IMAGES, masks or cityscapes.TRAIN_IDS
    if layout in drawn.FORMATS:
        return parsed(images, "images", root) if images else Side("", None), None
    if images and layout != "cvat":
        return parsed(images, "images", root), parsed(masks, "masks", root) if masks else None
    image_folder, mask_folder = _VOC if layout in ("voc", "cvat") else _CAMVID
    image_side = parsed(images, "images", root) if images else Side(image_folder, None)
    return image_side, parsed(masks, "masks", root) if masks else Side(mask_folder, None, (".png",))


def _with_original(search: Search, augmented: dict[str, str], notes: Notes) -> dict[str, str]:
    """Adds masks of VOC's own folder where the augmented folder has none, as in some mirrors."""
    original = dict(search.named_files(Side(_VOC[1], None, (".png",)), "masks", False, SkippedFiles()))
    missing = {name: path for name, path in original.items() if name not in augmented}
    if missing:
        notes.line(
            f"{counted(len(missing), 'mask')} from {_VOC[1]}/, missing in {_VOC_AUGMENTED}/, for example "
            f"{next(iter(missing.values()))}"
        )
    return augmented | missing


def _leave_out_masks(image_of: dict[str, str], mask_of: dict[str, str], notes: Notes) -> None:
    """Removes masks from the images: files that match both patterns, and files named like the mask of an
    image."""
    masks = set(mask_of.values())
    both = [name for name, path in image_of.items() if path in masks]
    for name in both:
        del image_of[name]
    if both:
        notes.line(f"treated as masks, though they match both patterns: {counted(len(both), 'file')}")
    name_of = {os.path.splitext(path)[0]: name for name, path in image_of.items()}
    folders, image_key_of = folders_of(name_of), {}
    for key, name in name_of.items():
        image = image_of_mask(key, name_of)
        if image is None and image_of[name].lower().endswith(".png"):
            image = image_of_mask_in_folder(key, name_of, folders)
        if image is not None:
            image_key_of[key] = image
    second = [key for key, image in image_key_of.items() if name_of[image] in mask_of]
    first = [key for key in image_key_of if key not in second]
    for kind, meaning in (
        (second, "further masks of images that have one; draw all objects of an image into one mask"),
        (first, "masks of images next to them; give --data.masks, or rename these files"),
    ):
        if kind:
            notes.warn(
                f"skipped, as their names mark them as {meaning}: {counted(len(kind), 'file')}, for example "
                f"{image_of[name_of[kind[0]]]} next to {image_of[name_of[image_key_of[kind[0]]]]}"
            )
    for key in image_key_of:
        del image_of[name_of[key]]


def _say_passed(skipped: SkippedFiles, notes: Notes) -> None:
    for line in skipped.lines():
        # Only skipped pictures need a warning; lists and notes are often kept with images.
        missed = skipped.pictures() and line.endswith("unsupported formats")
        (notes.warn if missed else notes.line)(f"skipped: {line}")


def _look_for_masks(search: Search, layout: str, images: str, searched: str, notes: Notes) -> None:
    """Rejects a known layout without masks if another folder may contain them; otherwise warns."""
    pngs, texts = [], []
    for folder in sorted(
        entry.name for entry in os.scandir(search.root) if entry.is_dir() and not entry.name.startswith(".")
    ):
        if folder == images or search.skip == search.root / folder:
            continue
        names = list(walk(search.root, folder, search.skip, follow_links=search.follow_links))
        pngs += [folder] * any(name.lower().endswith(".png") for name in names)
        texts += [folder] * (
            bool(names) and all(name.lower().endswith(".txt") for name in names) and folder == "labels"
        )
    finding = f"{search.root}: {images}/ indicates the layout {layout}, but {searched} contains no mask"
    if pngs:
        raise UserError(
            f"{finding}, and {' and '.join(f'{name}/' for name in pngs[:3])} holds PNGs: if they are the "
            f"masks, give --data.layout globs --data.images '{images}/**/*' --data.masks "
            f"'{pngs[0]}/**/*.png'; otherwise omit --data.masks"
        )
    polygons = "; labels/ holds text files (polygons or boxes), not masks" if texts else ""
    notes.warn(f"{finding}{polygons}; all images are unlabelled")
