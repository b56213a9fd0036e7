"""The judgement of a data set's masks: what no single file can tell.

A file is read by what it stores: a palette by its indices, 1, 2 and 4 bits by their numbers. Whether that is
what was meant shows only when all masks lie side by side: the same index in other colours, bits of another
depth, 255 for the object instead of ignore, edges that run through ids between two classes. What may be
misread is refused with the remedy, never guessed. A mask map that names every id says that the ids are meant;
one of colours reads what is seen.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from stpp.dataset.mask_map import MaskMap
from stpp.images.masks import IGNORE, Stored, count_indices

SOFT_SHARE, SOME_SHARE = 0.15, 0.04
"""Parts of all edges that pass through an id between two others: those of masks with soft edges or JPEG noise
are above 0.06, nearly always above 0.18; CamVid's are 0.009."""
LEAST_EDGES = 100
LOOKED_AT = 1 << 14
"""Pixels of a mask whose neighbours are looked at, about: more would cost a tenth of the preparation."""
THIN_IDS = 3
_REMEDY = "save masks without anti-aliasing and never as JPEG"


@dataclass(frozen=True, slots=True)
class Edges:
    """Neighbouring pixels of a mask that differ."""

    count: int
    soft: int
    """Pixels between two neighbours in a row or column, with an id strictly between theirs."""
    thin: int = 0
    """Ids that fill no 3x3 pixels anywhere; counted where edges are soft."""
    solid: int = 0
    """Ids that do."""


def edges(values: np.ndarray) -> Edges:
    """The edges of class ids, uint8 [H, W], in rows that are spread over a large mask; 255 counts as no
    id."""
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
    there = count_indices(values) > 0
    there[IGNORE] = False
    return Edges(
        count, soft, int(np.count_nonzero(there & (filled == 0))), int(np.count_nonzero(there & (filled > 0)))
    )


@dataclass
class Judge:
    """Takes the masks of a data set one by one, and says what is wrong with them together."""

    classes: Sequence[str]
    mask_map: MaskMap | None
    masks: int = 0
    _colours: dict[int, dict[int, str]] = field(default_factory=dict)
    """Index -> colour -> the first mask that has it."""
    _indices: dict[int, dict[int, str]] = field(default_factory=dict)
    """Colour, where a palette has it once, -> index -> the first mask."""
    _coloured: bool = False
    """True once a palette holds a colour that is no gray."""
    _gray_palettes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Masks whose palette shows an index as another gray: (index, gray)."""
    _depths: dict[int, str] = field(default_factory=dict)
    """Bits of grayscale masks -> the first that has them and holds more than 0."""
    _ids: Counter[int] = field(default_factory=Counter)
    _sets: dict[str, str] = field(default_factory=dict)
    """Whether 255 and other ids than 0 are in one mask -> the first such mask."""
    _edges: int = 0
    _soft: int = 0
    _solid: bool = False
    _soft_masks: list[str] = field(default_factory=list)
    _noisy_masks: list[str] = field(default_factory=list)

    def add(self, path: str, stored: Stored, counts: Sequence[int], found: Edges) -> None:
        """Takes a mask.

        Args:
            path: as users write it.
            counts: pixels of each class id, and of 255 at the end.
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
        self._edges += found.count
        self._soft += found.soft
        self._solid |= found.solid > 0
        if found.count >= LEAST_EDGES and found.soft > SOFT_SHARE * found.count:
            self._soft_masks.append(path)
            if found.solid and found.thin >= max(THIN_IDS, found.solid):
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
        """True where a number that is stored and the gray that is shown for it mean different classes.

        Args:
            outside: what a gray means that is no id of the data set; of a map, always nothing, so that the
                number is meant.
        """
        if index == gray:
            return False
        if self.mask_map is None:
            return True
        meanings = self.mask_map.classes_of(np.array([index, gray]))
        return bool(meanings[0] != meanings[1] and (meanings[1] >= 0 or outside is None))

    def problems(self) -> list[str]:
        """What may be misread, in a line each, with the remedy."""
        return self.stored_problems() + [text for text in (self._object_as_ignore(), self._noise()) if text]

    def stored_problems(self) -> list[str]:
        """Those of palettes and bits alone."""
        return [text for text in (self._palettes(), self._grays(), self._bits()) if text]

    def warnings(self) -> list[str]:
        """What looks like a mistake, and may be none."""
        soft = self._edges >= LEAST_EDGES and self._soft > SOME_SHARE * self._edges
        if not soft and not self._soft_masks or self._noise():
            return []
        share = 100 * self._soft / self._edges
        one = self._soft_masks[0] if self._soft_masks else "all of them alike"
        return [
            f"masks: {share:.0f} % of the edges pass through an id between the two classes ({one}), as soft "
            f"edges and JPEG noise "
            f"make them; look at contact-sheet.png, and {_REMEDY}"
        ]

    def _palettes(self) -> str | None:
        for index, colours in sorted(self._colours.items()):
            if len(colours) > 1:
                (one, first), (other, second) = list(colours.items())[:2]
                what = f"index {index} is {_hex(one)} in {first} and {_hex(other)} in {second}"
                return self._palette_text(what)
        for colour, indices in self._indices.items():
            if len(indices) > 1:
                (one, first), (other, second) = list(indices.items())[:2]
                return self._palette_text(f"{_hex(colour)} is index {one} in {first} and {other} in {second}")
        return None

    def _palette_text(self, what: str) -> str:
        seen = sorted({colour for colours in self._colours.values() for colour in colours})
        entries = " ".join(f"'{_hex(colour)}=CLASS'" for colour in seen[:8]) + " ..." * (len(seen) > 8)
        return (
            f"masks: their palettes differ: {what}, so an index is no class id; name what the colours mean: "
            f"--data.mask-map "
            f"{entries}, or save the masks as 8-bit grayscale PNGs of class ids"
        )

    def _grays(self) -> str | None:
        if self._coloured or not self._gray_palettes:
            return None
        path, (index, gray) = next(iter(self._gray_palettes.items()))
        seen = sorted({colour for colours in self._colours.values() for colour in colours})
        entries = " ".join(f"'{_hex(colour)}=CLASS'" for colour in seen[:8]) + " ..." * (len(seen) > 8)
        return (
            f"{path}: its palette shows index {index} as gray {gray}, and either may be the class id "
            f"({len(self._gray_palettes)} such "
            f"masks; programs that make PNGs smaller write such palettes); say what is seen: "
            f"--data.mask-map {entries}, or save "
            "the masks as 8-bit grayscale PNGs of class ids"
        )

    def _bits(self) -> str | None:
        low = [bits for bits in sorted(self._depths) if bits < 8]
        if not low or len(self._depths) == 1:
            return None
        other = max(self._depths)
        number = 255 // ((1 << low[0]) - 1)
        return (
            f"{self._depths[low[0]]}: has {low[0]} bits a pixel, and {self._depths[other]} has {other}: a "
            f"stored 1 is shown as gray "
            f"{number} there, and either may be the class id (programs that make PNGs smaller change the "
            f"bits); save all masks as "
            f"8-bit grayscale, or give both numbers one class: --data.mask-map 0=0 1=CLASS {number}=CLASS"
        )

    def _object_as_ignore(self) -> str | None:
        if self.mask_map is not None and (self.mask_map.in_colour or self.mask_map.names_ignore):
            return None
        name = self.classes[1]
        if set(self._ids) == {0, IGNORE}:
            rest = "" if len(self.classes) == 2 else f", and none of the ids 1 to {len(self.classes) - 1}"
            return (
                f"masks: they hold 0 and 255 alone{rest}, and 255 is ignore: if it means {name!r}, give "
                f"--data.mask-map 0=0 255=1; "
                "if it is ignore indeed, 0=0 255=ignore"
            )
        if len(self.classes) == 2 and {"ignored", "object"} <= self._sets.keys() and "both" not in self._sets:
            return (
                f"masks: some hold 0 and 255 ({self._sets['ignored']}), others 0 and 1 "
                f"({self._sets['object']}), none all three, "
                f"and 255 is ignore: if it means {name!r} too, give --data.mask-map 0=0 1=1 255=1; if not, "
                f"0=0 1=1 255=ignore"
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
            f"{masks[0]}: soft edges or JPEG noise: at its edges lie ids between the two classes, which are "
            f"other classes "
            f"({len(masks)} such masks); {_REMEDY}; if the ids are right as they are, --data.mask-map "
            f"0-{len(self.classes) - 1}=0-{len(self.classes) - 1} says so"
        )


def _hex(colour: int) -> str:
    return f"#{colour:06x}"
