"""Folders of unlabelled images besides the data root: `--data.unlabelled DIR ...`.

Every image below these folders belongs to the data set. Its name is the folder's own name and its path below
the folder: 2023/1.jpg in /big/field is `field/2023/1.jpg`. All files are thus below one base folder, the
folder's parent, and the names of the root's images do not depend on other folders.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from stpp.dataset import layouts
from stpp.dataset.layouts import FoundImage
from stpp.dataset.notes import Notes
from stpp.errors import UserError

FLAG = "--data.unlabelled"


def checked(folders: Sequence[str | os.PathLike]) -> list[str]:
    """Absolute paths of the folders, sorted.

    Raises:
        UserError: a missing folder, two folders of one name, or one inside another.
    """
    paths = []
    for folder in folders:
        layouts.checked_root(folder, FLAG)
        # links keep their own name, so that a link can rename a folder
        path = Path(os.path.abspath(Path(folder).expanduser()))
        if not path.name.isprintable() or not path.name or path.name.startswith("."):
            raise UserError(f"{FLAG} {folder}: this folder's name cannot be part of image names; give a link "
                            "with another name")
        paths.append(path)
    for first, second in combinations(sorted(paths), 2):
        if _contains(first.resolve(), second.resolve()) or _contains(second.resolve(), first.resolve()):
            raise UserError(f"{FLAG} {first} {second}: they contain the same images; give one of them")
        if first.name == second.name:
            raise UserError(f"{FLAG} {first} {second}: both are called {first.name}, and image names start "
                            "with it; give a link with another name to one of them")
    return [str(path) for path in sorted(paths)]


def places(folders: Sequence[str]) -> dict[str, Path]:
    """Base folder of images by the first part of their names."""
    return {Path(folder).name: Path(folder).parent for folder in folders}


def find(folders: Sequence[str], root: Path, found: Sequence[FoundImage], *, exclude: Path,
         follow_links: bool = False, notes: Notes | None = None) -> list[tuple[Path, list[FoundImage]]]:
    """Images of each checked folder, with the folder that their names are relative to.

    Args:
        root, found: the data root, and the images that its layout found.
        exclude: a folder to skip.
        follow_links, notes: see layouts.find.

    Raises:
        UserError: a folder without images, a folder with images or masks of the data set, or a name that an
            image of the root also has; see also layouts.find.
    """
    groups = []
    for folder in map(Path, folders):
        _refuse_taken(folder, root, found)
        images = layouts.find(folder, "globs", "**/*", exclude=exclude, flag=FLAG, follow_links=follow_links,
                              notes=notes)
        groups.append((folder.parent,
                       [FoundImage(f"{folder.name}/{image.key}", f"{folder.name}/{image.image}", None)
                        for image in images]))
    return groups


def _refuse_taken(folder: Path, root: Path, found: Sequence[FoundImage]) -> None:
    """Rejects a folder with files of the data set: its validation images could be trained on."""
    real, start = folder.resolve(), f"{folder.name}/"
    may_overlap = _contains(real, root) or _contains(root, real)
    for image in found:
        for path in filter(None, (image.image, image.mask)) if may_overlap else ():
            if _contains(real, root / path):
                raise UserError(f"{FLAG} {folder}: contains {path} of --data.root {root}; give folders "
                                "without its images and masks")
        if image.image.startswith(start):
            raise UserError(f"{FLAG} {folder}: image names start with the folder's name, as does "
                            f"{image.image} of --data.root {root}; give a link to the folder with another "
                            "name")


def _contains(folder: Path, path: Path) -> bool:
    return path == folder or str(path).startswith(f"{folder}{os.sep}")
