"""Search for the images or masks of a data set, and the names that pair them."""

import os
import unicodedata
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from stpp.annotations.shapes import ShapeSource
from stpp.dataset.patterns import Side
from stpp.dataset.walk import refuse_unlistable, walk
from stpp.errors import UserError
from stpp.images.folders import SkippedFiles
from stpp.images.image_file import IMAGE_EXTENSIONS


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image of a data set; paths are relative to the root, with forward slashes."""

    key: str
    """Path of the image without its extension."""
    image: str
    mask: str | None
    """Mask of the image, or the file with its shapes."""
    shapes: ShapeSource | None = None
    """Location of the shapes in that file, for layouts with drawn masks."""
    listed: str | None = None
    """JSON file that lists the image, with or without shapes (layout coco)."""


@dataclass(frozen=True, slots=True)
class Search:
    """File search in a data root."""

    root: Path
    skip: Path | None
    """Folder to skip."""
    follow_links: bool
    """Follow links out of the root."""

    def named_files(
        self, side: Side, kind: str, have_equal_groups: bool, skipped: SkippedFiles, *,
        apart: Set[str] = frozenset()
    ) -> Iterator[tuple[str, str]]:
        """Yields (pairing name, path) for each file of a side, rejecting duplicate names.

        Args:
            kind: "images" or "masks", for messages.
            have_equal_groups: both patterns have the same number of fixed folders between wildcards, which
                are then excluded from the name.
            skipped: counts skipped files.
            apart: paths to yield under their own path: neither counted as skipped, nor rejected as
                duplicates.
        """
        seen: dict[str, str] = {}
        for path in walk(self.root, side.prefix, self.skip, follow_links=self.follow_links, skipped=skipped):
            below = path[len(side.prefix) + 1 :] if side.prefix else path
            if not below.lower().endswith(side.extensions):
                skipped.unread(below)
                continue
            # Systems differ in Unicode normalisation, so an image and its mask can differ too.
            below = unicodedata.normalize("NFC", below)
            match = side.pattern.fullmatch(below) if side.pattern else None
            if side.pattern and not match:
                if path not in apart and not below.lower().endswith(IMAGE_EXTENSIONS):
                    skipped.unread(below)
                continue
            refuse_unlistable(self.root, path)
            name = (
                os.path.splitext(below)[0]
                if not match
                else "/".join(match.groups()[1:])
                if have_equal_groups
                else match[1]
            )
            if path in apart:
                name = path  # a mask that also matches the image pattern; removed later
            if name in seen:
                raise UserError(
                    f"{self.root}: duplicate key {name} of {kind}: {seen[name]} and {path}; "
                    f"{self._newer(seen[name], path)}"
                )
            seen[name] = path
            yield name, path

    def _newer(self, one: str, other: str) -> str:
        """Advice for two files of one name; often a mask was corrected and saved with another extension."""
        try:
            times = {path: os.stat(self.root / path).st_mtime_ns for path in (one, other)}
        except OSError:
            times = {one: 0, other: 0}
        newer = f" ({max(times, key=times.get)} is the newer)" if times[one] != times[other] else ""
        return f"rename or remove one{newer}"
