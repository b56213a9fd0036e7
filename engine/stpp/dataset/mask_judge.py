"""Consistency checks across a data set's masks, which no single file can reveal.

Files are read by their stored values: palettes by index, 1, 2 and 4 bits by number. Whether these are the
intended class ids shows only across all masks: one index with different colours, varying bit depths, 255 for
the object instead of ignore, edges that pass through ids between two classes. Ambiguous masks are rejected
with a remedy, never guessed. A mask map that names every id confirms the ids; a map of colours uses the
displayed colours.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from stpp.dataset.mask_map import MaskMap
from stpp.images.masks import IGNORE, Stored, count_indices

SOFT_SHARE, SOME_SHARE = 0.15, 0.04
"""Fractions of edges that pass through an id between two others: above 0.06, nearly always above 0.18, for
masks with soft edges or JPEG noise; 0.009 for CamVid."""
LEAST_EDGES = 100
LOOKED_AT = 1 << 14
"""Approximate number of pixels per mask whose neighbours are compared; more would cost a tenth of the
preparation."""
THIN_IDS = 3
_REMEDY = "save masks without anti-aliasing and never as JPEG"


@dataclass(frozen=True, slots=True)
class Edges:
    """Differing neighbouring pixels of a mask."""

    count: int
    soft: int
    """Pixels whose id is strictly between those of two opposite neighbours."""
    thin: int = 0
    """Ids without any filled 3x3 block; counted only if edges are soft."""
    solid: int = 0
    """Ids with a filled 3x3 block."""


def edges(values: np.ndarray) -> Edges:
    """Edges of class ids, uint8 [H, W], sampled in rows of a large mask; 255 does not count as an id."""
    count = soft = 0
    step = max(1, values.size // LOOKED_AT)
    rows = values[::step]
    for before, at, after in (
        (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]),
        (values[:-2:step], values[1:-1:step], values[2::step]),
    ):
        count += int(np.count_nonzero(before != at))
        rising = (before < at) & (at < after) & (after != IGNORE)
        falling = (before > at) & (at > after) & (before != IGNORE)
        soft += int(np.count_nonzero(rising | falling))
    if count < LEAST_EDGES or soft < SOME_SHARE * count:
        return Edges(count, soft)
    same = (values[:, 1:] == values[:, :-1])[1:] & (values[1:] == values[:-1])[:, 1:]
    same &= (values[:, 1:] == values[:, :-1])[:-1]
    whole = same[1:, 1:] & same[:-1, :-1] & same[1:, :-1] & same[:-1, 1:]
    filled = np.asarray(
        Image.fromarray(np.ascontiguousarray(values[1:-1, 1:-1])).histogram(Image.fromarray(whole))
    )
    present = count_indices(values) > 0
    present[IGNORE] = False
    thin, solid = (int(np.count_nonzero(present & part)) for part in (filled == 0, filled > 0))
    return Edges(count, soft, thin, solid)


@dataclass
class Judge:
    """Collects the masks of a data set, and reports inconsistencies across them."""

    classes: Sequence[str]
    mask_map: MaskMap | None
    masks: int = 0
    _colours: dict[int, dict[int, str]] = field(default_factory=dict)
    """Index -> colour -> first mask with it."""
    _indices: dict[int, dict[int, str]] = field(default_factory=dict)
    """Colour, if unique in its palette, -> index -> first mask."""
    _coloured: bool = False
    """True once a palette contains a colour that is not gray."""
    _gray_palettes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Masks whose palette displays an index as a different gray: (index, gray)."""
    _depths: dict[int, str] = field(default_factory=dict)
    """Bits of grayscale masks -> first mask of that depth with a value above 0."""
    _ids: Counter[int] = field(default_factory=Counter)
    _sets: dict[str, str] = field(default_factory=dict)
    """Presence of 255 and of ids above 0 in a mask -> first mask with it."""
    _edges: int = 0
    _soft: int = 0
    _solid: bool = False
    _soft_masks: list[str] = field(default_factory=list)
    _noisy_masks: list[str] = field(default_factory=list)

    def add(self, path: str, stored: Stored, counts: Sequence[int], mask_edges: Edges) -> None:
        """Adds a mask.

        Args:
            path: path as users write it.
            stored: its storage.
            counts: pixels per class id, then of 255.
            found: its edges.
        """
        self.masks += 1
        if self.mask_map is None or not self.mask_map.in_colour:
            self._add_stored(path, stored)
        present = {i for i, count in enumerate(counts[:-1]) if count}
        self._ids.update(present | ({IGNORE} if counts[-1] else set()))
        kind = (
            "both"
            if counts[-1] and present - {0}
            else "ignored"
            if counts[-1] and present
            else "object"
            if present - {0}
            else ""
        )
        self._sets.setdefault(kind, path)
        self._edges += mask_edges.count
        self._soft += mask_edges.soft
        self._solid |= mask_edges.solid > 0
        if mask_edges.count >= LEAST_EDGES and mask_edges.soft > SOFT_SHARE * mask_edges.count:
            self._soft_masks.append(path)
            if mask_edges.solid and mask_edges.thin >= max(THIN_IDS, mask_edges.solid):
                self._noisy_masks.append(path)

    def _add_stored(self, path: str, stored: Stored) -> None:
        for entry in stored.palette:
            self._colours.setdefault(entry.index, {}).setdefault(entry.colour, path)
            if entry.only:
                self._indices.setdefault(entry.colour, {}).setdefault(entry.index, path)
        if stored.kind == "palette":
            self._coloured |= not stored.gray_palette
            other = (
                next(
                    (
                        (entry.index, entry.colour & 255)
                        for entry in stored.palette
                        if self._read_otherwise(entry.index, entry.colour & 255)
                    ),
                    None,
                )
                if stored.gray_palette
                else None
            )
            if other:
                self._gray_palettes.setdefault(path, other)
        else:
            step = 255 // ((1 << min(stored.bits, 8)) - 1)
            if stored.bits >= 8 or any(
                self._read_otherwise(number, number * step, None) for number in stored.numbers
            ):
                self._depths.setdefault(min(stored.bits, 8), path)

    def _read_otherwise(self, index: int, gray: int, outside: int | None = -1) -> bool:
        """True if a stored number and the gray displayed for it map to different classes.

        Args:
            outside: class of a gray that is not an id of the data set; with a map always none, so that the
                number counts.
        """
        if index == gray:
            return False
        if self.mask_map is None:
            return True
        meanings = self.mask_map.classes_of(np.array([index, gray]))
        return bool(meanings[0] != meanings[1] and (meanings[1] >= 0 or outside is None))

    def problems(self) -> list[str]:
        """Ambiguities, one line each, with the remedy."""
        return self.stored_problems() + [text for text in (self._object_as_ignore(), self._noise()) if text]

    def stored_problems(self) -> list[str]:
        """Ambiguities of palettes and bit depths only."""
        return [text for text in (self._palettes(), self._grays(), self._bits()) if text]

    def warnings(self) -> list[str]:
        """Likely mistakes, one line each."""
        soft = self._edges >= LEAST_EDGES and self._soft > SOME_SHARE * self._edges
        if not soft and not self._soft_masks or self._noise():
            return []
        share = 100 * self._soft / self._edges
        example = self._soft_masks[0] if self._soft_masks else "in all masks"
        return [
            f"masks: {share:.0f} % of the edges pass through an id between the two classes ({example}), "
            f"which indicates soft edges or JPEG noise; check contact-sheet.png, and {_REMEDY}"
        ]

    def _palettes(self) -> str | None:
        for index, colours in sorted(self._colours.items()):
            if len(colours) > 1:
                (colour, first), (other, second) = list(colours.items())[:2]
                difference = f"index {index} is {_hex(colour)} in {first} and {_hex(other)} in {second}"
                return self._palette_text(difference)
        for colour, indices in self._indices.items():
            if len(indices) > 1:
                (index, first), (other, second) = list(indices.items())[:2]
                return self._palette_text(f"{_hex(colour)} is index {index} in {first} and {other} in "
                                          f"{second}")
        return None

    def _palette_text(self, difference: str) -> str:
        seen = sorted({colour for colours in self._colours.values() for colour in colours})
        entries = " ".join(f"'{_hex(colour)}=CLASS'" for colour in seen[:8]) + " ..." * (len(seen) > 8)
        return (
            f"masks: their palettes differ: {difference}, so indices are not class ids; map the colours: "
            f"--data.mask-map {entries}, or save the masks as 8-bit grayscale PNGs of class ids"
        )

    def _grays(self) -> str | None:
        if self._coloured or not self._gray_palettes:
            return None
        path, (index, gray) = next(iter(self._gray_palettes.items()))
        seen = sorted({colour for colours in self._colours.values() for colour in colours})
        entries = " ".join(f"'{_hex(colour)}=CLASS'" for colour in seen[:8]) + " ..." * (len(seen) > 8)
        return (
            f"{path}: its palette shows index {index} as gray {gray}, and either may be the class id "
            f"({len(self._gray_palettes)} masks of this kind; PNG optimisers write such palettes); map the "
            f"displayed grays: --data.mask-map {entries}, or save the masks as 8-bit grayscale PNGs of "
            "class ids"
        )

    def _bits(self) -> str | None:
        low = [bits for bits in sorted(self._depths) if bits < 8]
        if not low or len(self._depths) == 1:
            return None
        other = max(self._depths)
        number = 255 // ((1 << low[0]) - 1)
        return (
            f"{self._depths[low[0]]}: has {low[0]} bits a pixel, and {self._depths[other]} has {other}: a "
            f"stored 1 is displayed as gray {number}, and either may be the class id (PNG optimisers change "
            "the bit depth); save all masks as 8-bit grayscale, or map both numbers to one class: "
            f"--data.mask-map 0=0 1=CLASS {number}=CLASS"
        )

    def _object_as_ignore(self) -> str | None:
        if self.mask_map is not None and (self.mask_map.in_colour or self.mask_map.names_ignore):
            return None
        name = self.classes[1]
        if set(self._ids) == {0, IGNORE}:
            rest = "" if len(self.classes) == 2 else f", and none of the ids 1 to {len(self.classes) - 1}"
            return (
                f"masks: they hold only 0 and 255{rest}, and 255 is ignore: if it means {name!r}, give "
                "--data.mask-map 0=0 255=1; if it really is ignore, 0=0 255=ignore"
            )
        if len(self.classes) == 2 and {"ignored", "object"} <= self._sets.keys() and "both" not in self._sets:
            return (
                f"masks: some hold 0 and 255 ({self._sets['ignored']}), others 0 and 1 "
                f"({self._sets['object']}), none all three, and 255 is ignore: if it also means {name!r}, "
                "give --data.mask-map 0=0 1=1 255=1; if not, 0=0 1=1 255=ignore"
            )
        return None

    def _noise(self) -> str | None:
        if self.mask_map is not None:
            return None
        share = self._soft / max(self._edges, 1)
        if not self._noisy_masks and not (
            self._edges >= 4 * LEAST_EDGES and share > SOFT_SHARE and self._solid and self._soft_masks
        ):
            return None
        masks = self._noisy_masks or self._soft_masks
        return (
            f"{masks[0]}: soft edges or JPEG noise: its edges hold ids between the two classes, which are "
            f"other classes ({len(masks)} masks of this kind); {_REMEDY}; if the ids are correct, confirm "
            f"them with --data.mask-map 0-{len(self.classes) - 1}=0-{len(self.classes) - 1}"
        )


def _hex(colour: int) -> str:
    return f"#{colour:06x}"
