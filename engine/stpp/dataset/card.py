"""The data card: what a data set was found to hold, as a table for people and as JSON for programs.

`card.json`, `card.txt` and `contact-sheet.png` lie in the index's folder.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stpp import files, log
from stpp.dataset.check import Checked
from stpp.dataset.notes import Notes

JSON, TEXT, SHEET = "card.json", "card.txt", "contact-sheet.png"
_SHOWN = 6


def fields(one: Checked) -> dict[str, str]:
    """How one image file stores its picture, by what the card counts."""
    reading = one.reading
    return {
        "format": reading.format,
        "colour model": reading.colours + ", alpha" * reading.alpha,
        "bits": str(reading.bits),
        "orientation": str(one.orientation),
    }


@dataclass
class Tally:
    """Sums of the card over the files of a data set."""

    classes: Sequence[str]
    images: dict[str, Counter[str]] = field(default_factory=dict)
    """By the fields of images: how many have which value."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height), upright."""
    masks: Counter[str] = field(default_factory=Counter)
    """How masks store their ids."""
    ignored: int = 0

    def __post_init__(self):
        self.pixels = [0] * len(self.classes)
        self.masks_with = [0] * len(self.classes)

    def add(self, one: Checked) -> None:
        """Takes an image with its mask."""
        if one.reading is None:
            return
        for name, value in fields(one).items():
            self.images.setdefault(name, Counter())[value] += 1
        self.sizes[one.reading.width, one.reading.height] += 1
        if one.class_pixels is not None:
            stored = one.stored
            self.masks[f"{stored.kind}, {stored.bits} bits" if stored else "drawn from shapes"] += 1
            self.ignored += one.ignored
            for i, count in enumerate(one.class_pixels):
                self.pixels[i] += count
                self.masks_with[i] += count > 0

    def values(self) -> dict:
        """The sums as JSON values."""
        sides = [side for size in self.sizes for side in size]
        total = max(sum(self.pixels) + self.ignored, 1)
        classes = [
            {"name": name, "pixels": pixels, "share_pct": round(100 * pixels / total, 3), "images": images}
            for name, pixels, images in zip(self.classes, self.pixels, self.masks_with, strict=True)
        ]
        return {
            "images": {name: dict(counts.most_common()) for name, counts in self.images.items()},
            "sizes": {
                "different": len(self.sizes),
                "smallest_side_px": min(sides, default=0),
                "largest_side_px": max(sides, default=0),
                "common": {f"{w}x{h}": count for (w, h), count in self.sizes.most_common(_SHOWN)},
            },
            "masks": dict(self.masks.most_common()),
            "classes": classes,
            "ignored": {"pixels": self.ignored, "share_pct": round(100 * self.ignored / total, 3)},
        }


def write(out: Path, tally: Tally, *, about: dict, splits: dict[str, int], notes: Notes) -> None:
    """Writes card.json and card.txt.

    Args:
        about: root, layout and counts, for the head of the card.
        splits: images by what the data set's own lists and folders have them for.
    """
    values = {**about, **tally.values(), "splits": splits, "notes": notes.lines, "warnings": notes.warnings}
    files.write_json(out / JSON, values)
    said = [*notes.lines, *(f"warning: {text}" for text in notes.warnings)]
    files.write_text(out / TEXT, "\n".join([table(values), *([""] if said else []), *said]) + "\n")


def table(values: dict) -> str:
    """The card as text, without what was said on the way to it.

    Args:
        values: what card.json holds.
    """
    rows = [
        ("root", values["root"]),
        ("layout", values["layout"]),
        ("images", f"{values['counts']['images']}, {values['counts']['masks']} with a mask"),
    ]
    rows += [(name, _counted(counts)) for name, counts in values["images"].items()]
    sizes = values["sizes"]
    rows.append(
        (
            "sizes",
            f"{_counted(sizes['common'])}{', ...' * (sizes['different'] > len(sizes['common']))}; sides of "
            f"{sizes['smallest_side_px']} to {sizes['largest_side_px']} pixels",
        )
    )
    if values["masks"]:
        rows.append(("masks", _counted(values["masks"])))
    rows.append(("splits", ", ".join(f"{name} {count}" for name, count in values["splits"].items())))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if values["masks"]:
        classes = [("class", "pixels", "share", "images")]
        classes += [
            (one["name"], str(one["pixels"]), f"{one['share_pct']:.2f} %", str(one["images"]))
            for one in values["classes"]
        ]
        classes.append(
            ("255 (ignore)", str(values["ignored"]["pixels"]), f"{values['ignored']['share_pct']:.2f} %", "")
        )
        lines += ["", log.table(classes)]
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:_SHOWN])
