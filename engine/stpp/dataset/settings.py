"""The settings that an index depends on, resolved: what "auto" stands for, the class names, the masks of the
layout."""

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
    """What an index depends on besides the files, JSON-able, and where the class names are from.

    Args:
        root and the others: see stpp.dataset.index.prepare.

    Raises:
        UserError: a setting that is impossible, or does not fit what lies in the root.
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
        masks = files[0] if len(files) == 1 else masks  # without the folder that the shell was in
        asked = {"layout": layout, "mask_map": list(mask_map), "exif": exif} | shapes
        listed = class_list(root, layout, classes, legends.own_classes(folder, asked, files))
        legends.legend(folder, asked | {"classes": listed.names}, files)
    else:
        listed = class_list(root, layout, classes, layouts.own_classes(folder, layout))
        mask_map = mask_map or layouts.own_mask_map(folder, layout, masks, listed.names)
        mapping.parse(mask_map, listed.names)
    found = {
        "layout": layout,
        "images": images,
        "masks": masks,
        "classes": listed.names,
        "mask_map": list(mask_map),
        "exif": exif,
    }
    # Left out where they are not used: the fingerprint is then the one that the root alone has.
    found |= shapes
    if unlabelled:
        found["unlabelled"] = unlabelled_folders.checked(unlabelled)
    if follow_links:
        found["follow_links"] = True
    return found, listed


def refuse_inside(root: Path, out: Path, settings: dict) -> None:
    """Refuses an index in the root itself, or in a folder of images or masks; elsewhere below the root it may
    lie.

    Raises:
        UserError: it does.
    """
    taken = [
        root / prefix for prefix in layouts.folders(settings["layout"], settings["images"], settings["masks"])
    ]
    taken += [Path(folder).resolve() for folder in settings.get("unlabelled", ())]
    if out == root or any(out == folder or (folder != root and folder in out.parents) for folder in taken):
        raise UserError(
            f"{out}: the index may not lie among the user's images or masks; choose another folder"
        )


def say_classes(listed: ClassList, pixels: Sequence[int], root: Path, notes: Notes) -> None:
    """Says where the class names are from, and warns of those that no mask holds.

    Args:
        pixels: of each class in all masks; empty without masks.
    """
    empty = [name for name, count in zip(listed.names, pixels, strict=False) if not count]
    if listed.of_layout:
        highest = max((i for i, count in enumerate(pixels) if count), default=0)
        text = (
            f"classes: the {len(listed.names)} of the public data set that has {listed.source}; masks here "
            f"hold ids up to {highest}; for data of your own write their names to classes.json"
        )
        # A part of the public set lacks a few classes; another set of fewer classes ends early.
        (notes.warn if len(empty) > len(listed.names) // 2 else notes.line)(text)
    if empty and pixels:
        notes.warn(f"no mask of {root} holds a pixel of: {', '.join(empty)}")
