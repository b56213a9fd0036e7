"""Reader of a labelling's masks, from PNG files or tar archives (`stpp label --output`)."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from stpp.errors import UserError
from stpp.images import storage, tars
from stpp.images.image_file import DECODE_ERRORS


class MaskPlace(NamedTuple):
    """Location of a mask's PNG."""

    file: str
    offset: int
    bytes: int
    """Bytes of the PNG; -1: the whole file."""


class MaskFiles:
    """Index of the masks of one shard.

    Args:
        labels: folder of the labelling.
        part: name of the shard's table, without the extension.

    Raises:
        UserError: its archive is damaged.
    """

    def __init__(self, labels: Path, part: str):
        self._folder = labels / "masks"
        archive = self._folder / f"shard-{part.rpartition('-')[2]}.tar"
        self._archive = str(archive) if archive.exists() else None
        self._members: dict[str, tuple[int, int]] = {}
        if self._archive is not None:
            self._members = {member.name: (member.offset, member.bytes)
                             for member in tars.members(self._archive) if member.problem is None}

    def place(self, key: str) -> MaskPlace:
        """Locates a mask.

        Raises:
            KeyError: there is no such mask, or its name leads out of the folder.
        """
        if self._archive is not None:
            return MaskPlace(self._archive, *self._members[f"{key}.png"])
        path = self._folder / f"{key}.png"
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise KeyError(key)
        return MaskPlace(str(path), -1, -1)


def read(place: MaskPlace) -> np.ndarray:
    """Reads the class ids of a mask, uint8 [H, W].

    Raises:
        UserError: the mask cannot be read, or is not as written; names the file.
    """
    try:
        data = storage.read(place.file, place.offset, place.bytes)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, mask_HW = image.mode, np.asarray(image)
    except DECODE_ERRORS as error:
        raise UserError(f"{place.file}: a mask cannot be read ({type(error).__name__}); label its image "
                        "again (`stpp label --verify`)") from None
    if mode != "L":
        raise UserError(f"{place.file}: a mask is not the 8-bit gray PNG that was written ({mode}); another "
                        "program changed it: label its image again (`stpp label --verify`), and correct "
                        "masks in an export")
    return mask_HW
