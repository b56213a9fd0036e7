"""Which image belongs to which mask: the folder layouts that data sets come in.

`voc`: `JPEGImages/**` and `SegmentationClassAug/**.png`, or, where there is no such folder,
`SegmentationClass/**.png`.
`cityscapes`: `leftImg8bit/**/*_leftImg8bit.png` and `gtFine/**/*_gtFine_labelTrainIds.png`; or, where the
original masks are more, `*_gtFine_labelIds.png`, whose ids are then mapped.
`cvat`: VOC's folders, and `labelmap.txt`, which says what the colours of the masks mean.
`camvid`: `images/{train,val,...}/**` and `masks/<the same relative path>.png`.
`globs`: two patterns, such as `photos/**/*.jpg` and `labels/**/*_mask.png`. An image and a mask belong
together when what is left of their paths is equal, once the pattern's fixed folders and its fixed ending
(`.jpg`, `_mask.png`) are taken away. Between wildcards too, if both patterns have fixed folders there:
`*/photos/**/*` and `*/labels/**/*.png` pair
`a/photos/1.jpg` with `a/labels/1.png`.

`coco`, `yolo`, `labelme`: shapes, of which masks are drawn; see stpp.dataset.drawn.

All paths here are relative to the root, with forward slashes. Hidden files, what systems leave behind, and
masks among the images are passed over, and counted; extensions match in any case.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from stpp.annotations import cvat
from stpp.dataset import cityscapes, drawn, legends
from stpp.dataset.classes import ClassList, counts_nowhere
from stpp.dataset.notes import Notes, counted
from stpp.dataset.patterns import Side, parsed
from stpp.dataset.search import Found, Search
from stpp.dataset.walk import walk
from stpp.errors import UserError
from stpp.images.folders import PassedOver, folders_of, image_of_mask, image_of_mask_in_folder
from stpp.images.image_file import IMAGE_EXTENSIONS

LAYOUTS = ("auto", "voc", "cvat", "cityscapes", "camvid", "globs", *drawn.FORMATS)

_VOC = ("JPEGImages", "SegmentationClass")
_VOC_AUGMENTED = "SegmentationClassAug"
VOC_AUGMENTED_MASKS = f"{_VOC_AUGMENTED}/**/*.png"
"""The masks of a VOC root with such a folder; those that it lacks are then taken from SegmentationClass."""
_CAMVID = ("images", "masks")


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


def resolve(root: str | os.PathLike, layout: str, images: str | None = None) -> str:
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
    if layout == "cvat" and cvat.labels_in(path) is None:
        raise UserError(f"--data.layout cvat: {path / cvat.LABELMAP} is not there, or has no colours")
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
        "images/ (camvid) is there; give --data.images and --data.masks, patterns such as 'photos/**/*.jpg' "
        "and 'labels/**/*.png'"
    )


def own_classes(root: Path, layout: str) -> ClassList | None:
    """The class names that the labelmap of the layout cvat has; None of other layouts."""
    if layout != "cvat":
        return None
    names = [label.name for label in cvat.labels_in(root) if not counts_nowhere(label.name)]
    return ClassList(names, str(root / cvat.LABELMAP))


def own_masks(root: str | os.PathLike, layout: str, *, follow_links: bool = False) -> str | None:
    """The pattern of the masks that a resolved layout finds in this root; None: the first that the layout is
    known for."""
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
    """What the ids or colours in the masks of a resolved layout mean, if they are not class ids: see
    stpp.dataset.mask_map.

    Raises:
        UserError: a label of a labelmap is no class.
    """
    if layout == "cityscapes" and (masks or "").endswith("_labelIds.png"):
        return cityscapes.LABEL_IDS_MAP
    return legends.of_colours(root, cvat.labels_in(root), classes) if layout == "cvat" else ()


def folders(layout: str, images: str | None = None, masks: str | None = None) -> list[str]:
    """The fixed folders in which a resolved layout looks; "" is the root."""
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
) -> list[Found]:
    """Lists the images of a data set, sorted by path, each with its mask if it has one; says what is passed
    over.

    Args:
        root: the data root.
        layout: one of `LAYOUTS`.
        images: pattern of images for "globs".
        masks: pattern of masks; for the other layouts it replaces their own.
        exclude: a folder not to enter.
        flag: what gave the root.
        follow_links: follow links out of the root.
        notes: takes what there is to say.

    Raises:
        UserError: missing root, no layout fits, no image found, two images or two masks of one name, masks of
            which none belongs to an image, a layout whose masks lie elsewhere, a path or a link that leaves
            the root, a name that no list file could hold.
    """
    path, notes = checked_root(root), notes or Notes()
    layout = resolve(path, layout, images)
    given, given_images = masks, images
    images = cityscapes.IMAGES if layout == "cityscapes" else images
    is_drawn = layout in drawn.FORMATS
    masks = masks or own_masks(path, layout, follow_links=follow_links)
    image_side, mask_side = _sides(layout, images, masks, path)
    search = Search(path, Path(exclude).resolve() if exclude is not None else None, follow_links)

    patterns = [side.pattern for side in (image_side, mask_side) if side and side.pattern]
    alike = len(patterns) == 2 and patterns[0].groups == patterns[1].groups
    mask_of = dict(search.named(mask_side, "masks", alike, PassedOver())) if mask_side else {}
    if layout == "voc" and masks == VOC_AUGMENTED_MASKS:
        mask_of = _with_original(search, mask_of, notes)
    passed = PassedOver()
    taken = dict(search.named(image_side, "images", alike, passed, apart=set(mask_of.values())))
    _leave_out_masks(taken, mask_of, notes)
    if mask_side and not taken.keys() & mask_of.keys():
        taken, mask_of = image_side.without_lead(taken), mask_side.without_lead(mask_of)
    shapes = drawn.match(search, layout, given_images, given, taken, notes) if is_drawn and taken else {}
    found, keys, matched = [], {}, 0
    for name, image in taken.items():
        key = os.path.splitext(image)[0]
        if keys.setdefault(key, image) != image:
            raise UserError(f"{path}: duplicate key {key}: {keys[key]} and {image}; rename or remove one")
        mask = mask_of.pop(name, None)
        matched += mask is not None
        found.append(Found(key, image, *shapes.get(image, (mask, None))))
    passed.extensions.pop(drawn.ENDINGS.get(layout), None)
    _say_passed(passed, notes)
    if not found:
        looked = images or f"{image_side.prefix}/** ({' '.join(IMAGE_EXTENSIONS)})"
        unread = f"; {passed.lines()[0]}" if passed.extensions else ""
        raise UserError(f"{flag} {path}: no image found; looked for {looked}{unread}")
    if mask_of and not matched:
        mask = next(iter(mask_of.values()))
        raise UserError(
            f"{path}: no mask belongs to an image: for example {mask}, while images are named as "
            f"{found[0].image}; give both one name, or patterns whose fixed folders, beginnings and endings "
            "are all that differs, such as 'photos/**/*.jpg' and 'labels/**/*_mask.png'"
        )
    if is_drawn:
        return sorted(found, key=lambda one: one.image)
    if masks and not mask_of and not matched:
        raise UserError(f"--data.masks {masks}: no file matches it under {path}")
    if mask_of:
        notes.warn(
            f"{path}: masks that belong to no image: {len(mask_of)}, for example "
            f"{next(iter(mask_of.values()))}"
        )
    if not matched and not given and layout != "globs":
        _look_for_masks(search, layout, image_side.prefix, f"{mask_side.prefix}/", notes)
    return sorted(found, key=lambda one: one.image)


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
    """Masks of VOC's own folder where the augmented one has none: some mirrors of it hold the training images
    alone."""
    own = dict(search.named(Side(_VOC[1], None, (".png",)), "masks", False, PassedOver()))
    lacking = {name: path for name, path in own.items() if name not in augmented}
    if lacking:
        notes.line(
            f"{counted(len(lacking), 'mask')} from {_VOC[1]}/, as {_VOC_AUGMENTED}/ has none of these "
            f"images, for example {next(iter(lacking.values()))}"
        )
    return augmented | lacking


def _leave_out_masks(taken: dict[str, str], mask_of: dict[str, str], notes: Notes) -> None:
    """Removes masks from the images: files that both patterns match, and files that are called like a mask of
    an image."""
    masks = set(mask_of.values())
    both = [name for name, path in taken.items() if path in masks]
    for name in both:
        del taken[name]
    if both:
        notes.line(f"masks, no images, though they match the patterns of both: {counted(len(both), 'file')}")
    named = {os.path.splitext(path)[0]: name for name, path in taken.items()}
    folders, beside = folders_of(named), {}
    for key, name in named.items():
        image = image_of_mask(key, named)
        if image is None and taken[name].lower().endswith(".png"):
            image = image_of_mask_in_folder(key, named, folders)
        if image is not None:
            beside[key] = image
    second = [key for key, image in beside.items() if named[image] in mask_of]
    first = [key for key in beside if key not in second]
    for kind, what in (
        (second, "further masks of images that have one; draw all objects of an image into one mask"),
        (first, "masks of images beside them; name masks with --data.masks, or give these files other names"),
    ):
        if kind:
            notes.warn(
                f"not read, as they are by their names {what}: {counted(len(kind), 'file')}, for example "
                f"{taken[named[kind[0]]]} beside {taken[named[beside[kind[0]]]]}"
            )
    for key in beside:
        del taken[named[key]]


def _say_passed(passed: PassedOver, notes: Notes) -> None:
    for line in passed.lines():
        # Only pictures can be missed: people keep lists and notes beside their images.
        missed = passed.pictures() and line.endswith("formats that are read")
        (notes.warn if missed else notes.line)(f"passed over: {line}")


def _look_for_masks(search: Search, layout: str, images: str, looked: str, notes: Notes) -> None:
    """A known layout without a mask: refused where another folder holds what may be the masks, said else."""
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
    what = f"{search.root}: {images}/ makes this the layout {layout}, but no mask is in {looked}"
    if pngs:
        raise UserError(
            f"{what}, and {' and '.join(f'{name}/' for name in pngs[:3])} holds PNGs: if they are the masks, "
            f"give --data.layout globs --data.images '{images}/**/*' --data.masks '{pngs[0]}/**/*.png'; if "
            "they are not, leave --data.masks out"
        )
    polygons = "; labels/ holds text files (polygons or boxes), which are no masks" if texts else ""
    notes.warn(f"{what}{polygons}; all images are unlabelled")
