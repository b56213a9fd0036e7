"""A prepared data set in memory: its images, their files, and the samples that loaders read."""

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
    """An image of an index; paths are relative to the data root, or to the folder of `Index.place`."""

    key: str
    image: str
    mask: str | None
    """The user's mask file."""
    converted: str | None
    """Re-encoded mask, relative to the index's folder; None where the user's mask is plain."""
    width: int
    """In pixels, after the EXIF rule."""
    height: int
    orientation: int
    """`orientation` to `bits`: see stpp.images.reading.Reading."""
    plain: bool
    format: str
    colours: str
    alpha: bool
    bits: int
    used_bits: int
    """Bits that the image uses; see stpp.images.reading.check_decodable."""
    class_pixels: list[int] | None
    """Pixels of each class in the mask; None without a mask."""
    bytes: int
    """Size of the image file."""
    mtime_ns: int
    mask_bytes: int | None = None
    """Size of the user's mask file."""
    mask_mtime_ns: int | None = None
    listed: str | None = None
    """JSON file that lists the image, with or without shapes (layout coco)."""


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
    """Digest of the files' sizes and times and of the settings, cheap to compare; empty if files changed and
    could not be read."""
    contents: str
    """Digest of the images' paths, bytes and class ids; equal for a copy of the data set elsewhere."""
    counts: dict[str, int]
    """Number of images, masks and converted masks."""
    entries: Mapping[str, Entry]
    """Entries by image path relative to the root, sorted; images of further folders come last."""
    unlabelled: Mapping[str, Path] = field(default_factory=dict)
    """Parent folders of images outside the root, by the first part of their paths."""
    settings: Mapping = field(default_factory=dict)
    """Resolved settings of the preparation."""
    twins: Mapping[str, int] = field(default_factory=dict)
    """Group number of each image that has copies; copies share it."""
    warnings: tuple[str, ...] = ()
    """Warnings of the preparation."""

    def place(self, image: str) -> Path:
        """Folder that an image's path is relative to."""
        return self.unlabelled.get(image.partition("/")[0], self.root)

    def find(self, image: str) -> Entry | None:
        """Entry of an image, in any Unicode normalisation of its path; None if there is none."""
        return (
            self.entries.get(image)
            or self.entries.get(unicodedata.normalize("NFC", image))
            or self.entries.get(unicodedata.normalize("NFD", image))
        )

    def changed(self, keys: Iterable[str]) -> list[str]:
        """Paths of these keys' images and masks that changed since the preparation; all of them if the index
        is known to be stale."""
        wanted, paths = set(keys), []
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
                        paths.append(path)
        return list(dict.fromkeys(paths))  # one file may hold shapes of many images

    def class_pixels(self, samples: Iterable[Sample]) -> list[list[int]]:
        """Pixels per class in the data set's masks of these samples, in sample order; zeros without a
        mask."""
        return [entry.class_pixels or [0] * len(self.classes) for entry in self.entries_of(samples)]

    def entries_of(self, samples: Iterable[Sample]) -> list[Entry]:
        """Entries of samples, in sample order."""
        by_key = {entry.key: entry for entry in self.entries.values()}
        return [by_key[sample.key] for sample in samples]

    def sample(self, image: str, *, strong: bool = False, mask: str | None | EllipsisType = ...) -> Sample:
        """Sample that a loader reads for an image.

        Args:
            image: path relative to the root.
            strong: see Sample.
            mask: path of another mask (a pseudo label), or None for no mask; omitted: the data set's own
                mask, if any.

        Raises:
            UserError: the image is not in the index.
        """
        entry = self.find(image)
        if entry is None:
            raise UserError(f"{image}: not in the index of {self.root}; paths are relative to --data.root")
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
