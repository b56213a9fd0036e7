"""Resolution of the settings that an index depends on: layout, class names and mask locations."""

import os
from collections.abc import Sequence
from pathlib import Path

from stpp.dataset import drawn, layouts, legends, unlabelled_folders
from stpp.dataset import mask_map as mapping
from stpp.dataset.classes import ClassList, class_list
from stpp.dataset.notes import Notes
from stpp.errors import UserError


def resolved(
    root: str | os.PathLike,
    *,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    classes: Sequence[str] = (),
    mask_map: Sequence[str] = (),
    exif: bool = True,
    unlabelled: Sequence[str | os.PathLike] = (),
    follow_links: bool = False,
    unlisted: str | None = None,
    annotated: str | None = None,
    crowds: str | None = None,
    doubtful: str | None = None,
) -> tuple[dict, ClassList]:
    """Resolved settings of an index, as JSON values, and the source of its class names.

    Args:
        root and the others: see stpp.dataset.index.prepare.

    Raises:
        UserError: an invalid setting, or one that does not match the content of the root.
    """
    if not isinstance(exif, bool):
        raise TypeError(f"exif: expected a bool, got {exif!r}")
    layout, folder = layouts.resolve(root, layout, images), layouts.checked_root(root)
    masks = masks or layouts.own_masks(root, layout, follow_links=follow_links)
    shapes = {"unlisted": unlisted, "annotated": annotated, "crowds": crowds, "doubtful": doubtful}
    drawn.refuse_settings(layout, images, masks, shapes, exif=exif)
    shapes = {name: value for name, value in shapes.items() if value is not None}
    if layout in drawn.FORMATS:
        files = drawn.files_of(folder, layout, masks, follow_links=follow_links)
        masks = files[0] if len(files) == 1 else masks  # independent of the working directory
        request = {"layout": layout, "mask_map": list(mask_map), "exif": exif} | shapes
        class_names = class_list(root, layout, classes, legends.own_classes(folder, request, files))
        legends.legend(folder, request | {"classes": class_names.names}, files)
    else:
        class_names = class_list(root, layout, classes, layouts.own_classes(folder, layout))
        mask_map = mask_map or layouts.own_mask_map(folder, layout, masks, class_names.names)
        mapping.parse(mask_map, class_names.names)
    resolved_settings = {
        "layout": layout,
        "images": images,
        "masks": masks,
        "classes": class_names.names,
        "mask_map": list(mask_map),
        "exif": exif,
    }
    # Omitted if unused, so that the fingerprint stays the same as without these settings.
    resolved_settings |= shapes
    if unlabelled:
        resolved_settings["unlabelled"] = unlabelled_folders.checked(unlabelled)
    if follow_links:
        resolved_settings["follow_links"] = True
    return resolved_settings, class_names


def refuse_inside(root: Path, out: Path, settings: dict) -> None:
    """Rejects an index in the root itself or in a folder of images or masks; elsewhere below the root it is
    allowed.

    Raises:
        UserError: `out` is in one of these folders.
    """
    data_folders = [
        root / prefix for prefix in layouts.folders(settings["layout"], settings["images"], settings["masks"])
    ]
    data_folders += [Path(folder).resolve() for folder in settings.get("unlabelled", ())]
    if out == root or any(out == folder or (folder != root and folder in out.parents)
                          for folder in data_folders):
        raise UserError(f"{out}: the index must not be among the images or masks; choose another folder")


def say_classes(class_names: ClassList, pixels: Sequence[int], root: Path, notes: Notes) -> None:
    """Reports the source of the class names, and warns of classes that no mask contains.

    Args:
        pixels: pixels per class in all masks; empty without masks.
    """
    empty = [name for name, count in zip(class_names.names, pixels, strict=False) if not count]
    if class_names.of_layout:
        highest = max((i for i, count in enumerate(pixels) if count), default=0)
        text = (
            f"classes: the {len(class_names.names)} of the public data set with {class_names.source}; these "
            f"masks hold ids up to {highest}; for your own data write the class names to classes.json"
        )
        # A subset of the public set lacks a few classes; another set with fewer classes lacks the last ones.
        (notes.warn if len(empty) > len(class_names.names) // 2 else notes.line)(text)
    if empty and pixels:
        notes.warn(f"no mask of {root} holds a pixel of: {', '.join(empty)}")
