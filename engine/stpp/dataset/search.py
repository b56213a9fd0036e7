"""The search for one side of a data set, its images or its masks, and the names by which the two are
paired."""

import os
import unicodedata
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from stpp.annotations.shapes import ShapeSource
from stpp.dataset.patterns import Side
from stpp.dataset.walk import refuse_unlistable, walk
from stpp.errors import UserError
from stpp.images.folders import PassedOver
from stpp.images.image_file import IMAGE_EXTENSIONS


@dataclass(frozen=True, slots=True)
class Found:
    """An image of a data set; paths are relative to the root, with forward slashes."""

    key: str
    """The image's path without its extension."""
    image: str
    mask: str | None
    """Its mask, or the file that its shapes stand in."""
    shapes: ShapeSource | None = None
    """Where in that file, of layouts whose masks are drawn."""


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for files of a data root."""

    root: Path
    skip: Path | None
    """A folder not to enter."""
    follow_links: bool
    """Follow links out of the root."""

    def named(
        self, side: Side, what: str, alike: bool, passed: PassedOver, *, apart: Set[str] = frozenset()
    ) -> Iterator[tuple[str, str]]:
        """(pairing name, path) of the files of a side, refusing two of equal name.

        Args:
            alike: both patterns have as many fixed folders between wildcards, which are then no part of the
                name.
            passed: counts what is not taken.
            apart: paths that are not counted as left out, nor refused for a name that they share.
        """
        seen: dict[str, str] = {}
        for path in walk(self.root, side.prefix, self.skip, follow_links=self.follow_links, passed=passed):
            below = path[len(side.prefix) + 1 :] if side.prefix else path
            if not below.lower().endswith(side.extensions):
                passed.unread(below)
                continue
            # Accents may be one code point or two: systems differ, so that an image and its mask can differ
            # too.
            below = unicodedata.normalize("NFC", below)
            match = side.pattern.fullmatch(below) if side.pattern else None
            if side.pattern and not match:
                if path not in apart and not below.lower().endswith(IMAGE_EXTENSIONS):
                    passed.unread(below)
                continue
            refuse_unlistable(self.root, path)
            name = (
                os.path.splitext(below)[0]
                if not match
                else "/".join(match.groups()[1:])
                if alike
                else match[1]
            )
            if path in apart:
                name = path  # a mask that the pattern of the images matches too, and that is left out later
            if name in seen:
                raise UserError(
                    f"{self.root}: duplicate key {name} of {what}: {seen[name]} and {path}; "
                    f"{self._newer(seen[name], path)}"
                )
            seen[name] = path
            yield name, path

    def _newer(self, one: str, other: str) -> str:
        """Advice for two files of one name: people mend a mask, save it under another extension, and keep the
        old one."""
        try:
            times = {path: os.stat(self.root / path).st_mtime_ns for path in (one, other)}
        except OSError:
            times = {one: 0, other: 0}
        newer = f" ({max(times, key=times.get)} is the newer)" if times[one] != times[other] else ""
        return f"rename or remove one{newer}"
