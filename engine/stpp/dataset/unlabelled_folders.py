"""Folders of unlabelled images besides the data root: `--data.unlabelled DIR ...`.

Every image below such a folder belongs to the data set. It is named by the folder's own name and its path
below it: 2023/1.jpg in /big/field is `field/2023/1.jpg`. So all its files are below one place, the folder's
parent, as those of the data set are below the root, and the names of the root's images do not depend on other
folders.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from stpp.dataset import layouts
from stpp.dataset.layouts import Found
from stpp.dataset.notes import Notes
from stpp.errors import UserError

FLAG = "--data.unlabelled"


def checked(folders: Sequence[str | os.PathLike]) -> list[str]:
    """Their absolute paths, sorted.

    Raises:
        UserError: one is missing, two have one name, or one lies in another.
    """
    paths = []
    for folder in folders:
        layouts.checked_root(folder, FLAG)
        # a link keeps its name: it is the way to another one
        path = Path(os.path.abspath(Path(folder).expanduser()))
        if not path.name.isprintable() or not path.name or path.name.startswith("."):
            raise UserError(f"{FLAG} {folder}: images cannot be named by this folder's name; give a link to "
                            "it of another name")
        paths.append(path)
    for one, other in combinations(sorted(paths), 2):
        if _contains(one.resolve(), other.resolve()) or _contains(other.resolve(), one.resolve()):
            raise UserError(f"{FLAG} {one} {other}: they hold the same images; give one of them")
        if one.name == other.name:
            raise UserError(f"{FLAG} {one} {other}: images are named by the folder's name, and both are "
                            f"{one.name}; give a link to one of them of another name")
    return [str(path) for path in sorted(paths)]


def places(folders: Sequence[str]) -> dict[str, Path]:
    """The folder that images are below, by the first part of their names."""
    return {Path(folder).name: Path(folder).parent for folder in folders}


def find(folders: Sequence[str], root: Path, found: Sequence[Found], *, exclude: Path,
         follow_links: bool = False, notes: Notes | None = None) -> list[tuple[Path, list[Found]]]:
    """The images of each of the checked folders, and the folder that their names are relative to.

    Args:
        root, found: the data root, and what its layout found there.
        exclude: a folder not to enter.
        follow_links, notes: see layouts.find.

    Raises:
        UserError: no image in a folder, images or masks of the data set in it, or a name that the root's
            images have too; see also layouts.find.
    """
    groups = []
    for folder in map(Path, folders):
        _refuse_taken(folder, root, found)
        images = layouts.find(folder, "globs", "**/*", exclude=exclude, flag=FLAG, follow_links=follow_links,
                              notes=notes)
        groups.append((folder.parent,
                       [Found(f"{folder.name}/{one.key}", f"{folder.name}/{one.image}", None)
                        for one in images]))
    return groups


def _refuse_taken(folder: Path, root: Path, found: Sequence[Found]) -> None:
    """Refuses a folder with files of the data set: its validation images, for example, would be trained
    on."""
    real, start = folder.resolve(), f"{folder.name}/"
    shared = _contains(real, root) or _contains(root, real)
    for one in found:
        for path in filter(None, (one.image, one.mask)) if shared else ():
            if _contains(real, root / path):
                raise UserError(f"{FLAG} {folder}: {path} of --data.root {root} lies in it; give folders "
                                "without its images and masks")
        if one.image.startswith(start):
            raise UserError(f"{FLAG} {folder}: images are named by the folder's name, and {one.image} of "
                            f"--data.root {root} begins with it too; give a link to the folder of another "
                            "name")


def _contains(folder: Path, path: Path) -> bool:
    return path == folder or str(path).startswith(f"{folder}{os.sep}")
