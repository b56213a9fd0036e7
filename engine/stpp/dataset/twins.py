"""Images that a data set holds twice: one file reached by two names, and copies.

A file that links reach twice is one image. Copies, found by their bytes, stay; lists that validate on one and
train on another are warned of.
"""

import filecmp
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from stpp.dataset.layouts import Found
from stpp.dataset.notes import Notes, counted
from stpp.dataset.split_folders import kinds
from stpp.dataset.stamps import Stamp
from stpp.errors import UserError


def once(
    places: Sequence[tuple[Path, Sequence[tuple[Found, Stamp, Stamp | None]]]], notes: Notes
) -> list[tuple[Path, list[tuple[Found, Stamp, Stamp | None]]]]:
    """The images with the stamps of themselves and their masks, each file but once.

    Of several names one stays that has a mask, else one for validation, else one that is no link.

    Args:
        places: folder that paths are relative to, and its images.

    Raises:
        UserError: one file with two masks that differ.
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
            f"taken once, as links lead to the same file: {counted(len(dropped), 'image')}, for example "
            f"{image[other]}, which is "
            f"{image[kept]}"
        )
    return [
        (place, [one for position, one in enumerate(members) if (number, position) not in dropped])
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
    if len(masks) < 2 or masks[0][1].file == masks[1][1].file:
        return
    (first, _, found), (second, _, twin) = masks
    try:
        equal = filecmp.cmp(first, second, shallow=False)
    except OSError:
        return  # what cannot be read is named later
    if not equal:
        raise UserError(
            f"{found.image} and {twin.image} are one file, through a link, and their masks {found.mask} and "
            f"{twin.mask} "
            "differ; remove one of them"
        )


def to_compare(sizes: Sequence[int]) -> set[int]:
    """The sizes in bytes that several files have: their bytes must be compared."""
    return {size for size, count in Counter(sizes).items() if count > 1 and size >= 0}


def groups(digests: Mapping[str, Sequence[str]], notes: Notes) -> list[list[str]]:
    """Images that are copies of each other, of the images by their digest."""
    found = sorted(sorted(images) for images in digests.values() if len(images) > 1)
    if found:
        copies = sum(map(len, found)) - len(found)
        notes.warn(
            f"copies of other images, byte for byte: {counted(copies, 'image')}, for example {found[0][1]} "
            f"of {found[0][0]}"
        )
    return found
