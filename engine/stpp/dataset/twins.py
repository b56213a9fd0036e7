"""Duplicate images of a data set: one file under two names, and copies.

A file reached through two links counts as one image. Byte-for-byte copies are kept; lists that train on one
copy and validate on another cause a warning.
"""

import filecmp
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from stpp.dataset.layouts import FoundImage
from stpp.dataset.notes import Notes, counted
from stpp.dataset.split_folders import kinds
from stpp.dataset.stamps import Stamp
from stpp.errors import UserError


def deduplicated(
    places: Sequence[tuple[Path, Sequence[tuple[FoundImage, Stamp, Stamp | None]]]], notes: Notes
) -> list[tuple[Path, list[tuple[FoundImage, Stamp, Stamp | None]]]]:
    """Images with the stamps of themselves and their masks, each file only once.

    Among several names of a file, one with a mask is kept, else one for validation, else one that is not a
    link.

    Args:
        places: base folder and images, for each folder.

    Raises:
        UserError: one file with two differing masks.
    """
    names: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, (_, members) in enumerate(places):
        for position, (_, stamp, _) in enumerate(members):
            if stamp.file != (0, 0):
                names[stamp.file].append((number, position))
    dropped: dict[tuple[int, int], tuple[int, int]] = {}
    for same in names.values():
        if len(same) > 1:
            kept = min(same, key=lambda at: _rank(places, at))
            for other in same:
                if other != kept:
                    _refuse_two_masks(places, kept, other)
                    dropped[other] = kept
    if dropped:
        other, kept = next(iter(dropped.items()))
        image = {at: places[at[0]][1][at[1]][0].image for at in (other, kept)}
        notes.line(
            f"used once, as links lead to the same file: {counted(len(dropped), 'image')}, for example "
            f"{image[other]}, which is {image[kept]}"
        )
    return [
        (place, [member for position, member in enumerate(members) if (number, position) not in dropped])
        for number, (place, members) in enumerate(places)
    ]


def _rank(places, at: tuple[int, int]) -> tuple:
    place, members = places[at[0]]
    found = members[at[1]][0]
    return (
        found.mask is None,
        at[0],
        "val" not in kinds(found.image),
        os.path.realpath(place / found.image) != str(place / found.image),
        found.image,
    )


def _refuse_two_masks(places, one: tuple[int, int], other: tuple[int, int]) -> None:
    masks = []
    for number, position in (one, other):
        place, members = places[number]
        found, _, stamp = members[position]
        if stamp is not None:
            masks.append((place / found.mask, stamp, found))
    if len(masks) < 2:
        return
    (first, stamp, found), (second, other_stamp, twin) = masks
    if stamp.file == other_stamp.file:
        if found.shapes != twin.shapes:
            raise UserError(f"{found.image} and {twin.image} are one file, through a link, and {found.mask} "
                            "has annotations for each of them; remove one of them")
        return
    try:
        equal = filecmp.cmp(first, second, shallow=False)
    except OSError:
        return  # unreadable files are reported later
    if not equal:
        raise UserError(
            f"{found.image} and {twin.image} are one file, through a link, but their masks {found.mask} and "
            f"{twin.mask} differ; remove one of them"
        )


def groups(copies: Iterable[Sequence[str]], notes: Notes) -> list[list[str]]:
    """Sorts and reports the groups of images that are copies of each other."""
    copy_groups = sorted(map(sorted, copies))
    if copy_groups:
        copies = sum(map(len, copy_groups)) - len(copy_groups)
        notes.warn(
            f"exact copies of other images: {counted(copies, 'image')}, for example {copy_groups[0][1]} of "
            f"{copy_groups[0][0]}"
        )
    return copy_groups
