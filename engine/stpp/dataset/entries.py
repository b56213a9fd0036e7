"""A prepared data set in memory: its images, where they lie, and what a loader reads for each."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType

from stpp.dataset.stamps import stamp
from stpp.errors import UserError
from stpp.loading.sample import Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of an index; paths relative to the data root, or to what Index.place says."""

    key: str
    image: str
    mask: str | None
    """The user's mask."""
    converted: str | None
    """The mask written anew, relative to the index's folder; None where the user's own is plain."""
    width: int
    """Pixels, after the EXIF rule."""
    height: int
    orientation: int
    """This and the next five: see stpp.images.reading.Reading."""
    plain: bool
    format: str
    colours: str
    alpha: bool
    bits: int
    used_bits: int
    """Bits that the image uses; see stpp.images.reading.prove."""
    class_pixels: list[int] | None
    """Pixels of each class in the mask; None without a mask."""
    bytes: int
    """Of the image file."""
    mtime_ns: int
    mask_bytes: int | None = None
    """Of the user's mask."""
    mask_mtime_ns: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A prepared data set."""

    out: Path
    """The index's folder."""
    root: Path
    classes: tuple[str, ...]
    layout: str
    exif: bool
    fingerprint: str
    """Changes when a file of the data set, or a setting, does; empty: files changed, and could not be
    read."""
    counts: dict[str, int]
    """images, masks, converted."""
    entries: Mapping[str, Entry]
    """By the image's path relative to the root, sorted; behind them those of further folders."""
    unlabelled: Mapping[str, Path] = field(default_factory=dict)
    """Where images lie that are not below the root, by the first part of their paths."""
    settings: Mapping = field(default_factory=dict)
    """What it was prepared with, resolved."""
    twins: Mapping[str, int] = field(default_factory=dict)
    """A number for each image that has copies; copies have the same."""
    warnings: tuple[str, ...] = ()
    """What the preparation warned of."""

    def place(self, image: str) -> Path:
        """The folder that an image's path is relative to."""
        return self.unlabelled.get(image.partition("/")[0], self.root)

    def find(self, image: str) -> Entry | None:
        """The entry of an image, its accents written in any form; None if there is none."""
        return (
            self.entries.get(image)
            or self.entries.get(unicodedata.normalize("NFC", image))
            or self.entries.get(unicodedata.normalize("NFD", image))
        )

    def changed(self, keys: Iterable[str]) -> list[str]:
        """Paths of the images and masks of these keys that are not, or no longer, the files that were looked
        at; all of an index that is known to be stale."""
        wanted, found = set(keys), []
        for entry in self.entries.values():
            if entry.key in wanted:
                for path, size, mtime_ns in (
                    (entry.image, entry.bytes, entry.mtime_ns),
                    (entry.mask, entry.mask_bytes, entry.mask_mtime_ns),
                ):
                    if path is None:
                        continue
                    now = stamp(self.place(entry.image), path)[1:3]
                    if not self.fingerprint or now != (size, mtime_ns):
                        found.append(path)
        return list(dict.fromkeys(found))  # one file may hold the shapes of many images

    def class_pixels(self, samples: Iterable[Sample]) -> list[list[int]]:
        """Pixels of each class in the data set's masks of these samples, in their order; zeros without a
        mask."""
        return [entry.class_pixels or [0] * len(self.classes) for entry in self.entries_of(samples)]

    def entries_of(self, samples: Iterable[Sample]) -> list[Entry]:
        """The entries of samples, in their order."""
        by_key = {entry.key: entry for entry in self.entries.values()}
        return [by_key[sample.key] for sample in samples]

    def sample(self, image: str, *, strong: bool = False, mask: str | None | EllipsisType = ...) -> Sample:
        """What a loader reads for an image.

        Args:
            image: path relative to the root.
            strong: see Sample.
            mask: path of another mask (a pseudo label), or None for none; left out: the data set's own, if it
                has one.

        Raises:
            UserError: the index has no such image.
        """
        entry = self.find(image)
        if entry is None:
            raise UserError(f"{image}: not in the index of {self.root}; is it named relative to --data.root?")
        if mask is ...:
            mask = None
            if entry.mask is not None:
                mask = str(self.out / entry.converted if entry.converted else self.root / entry.mask)
        elif mask is not None:
            mask = os.path.abspath(mask)
        return Sample(
            key=entry.key,
            image=str(self.place(entry.image) / entry.image),
            mask=mask,
            width=entry.width,
            height=entry.height,
            orientation=entry.orientation,
            plain=entry.plain,
            strong=strong,
        )
