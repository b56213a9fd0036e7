"""The data card: a summary of a data set, as a table for people and as JSON for programs.

`card.json`, `card.txt` and `contact-sheet.png` are in the index's folder.
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


def fields(checked: Checked) -> dict[str, str]:
    """Storage properties of an image file, by the rows of the card."""
    reading = checked.reading
    return {
        "format": reading.format,
        "colour model": reading.colours + ", alpha" * reading.alpha,
        "bits": str(reading.bits),
        "orientation": str(checked.orientation),
    }


@dataclass
class Tally:
    """Totals of the card over all files."""

    classes: Sequence[str]
    images: dict[str, Counter[str]] = field(default_factory=dict)
    """Counts by image property and value."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) after EXIF rotation."""
    masks: Counter[str] = field(default_factory=Counter)
    """Counts by mask storage."""
    ignored: int = 0

    def __post_init__(self):
        self.pixels = [0] * len(self.classes)
        self.masks_with = [0] * len(self.classes)

    def add(self, checked: Checked) -> None:
        """Counts an image with its mask."""
        if checked.reading is None:
            return
        for name, value in fields(checked).items():
            self.images.setdefault(name, Counter())[value] += 1
        self.sizes[checked.reading.width, checked.reading.height] += 1
        if checked.class_pixels is not None:
            stored = checked.stored
            self.masks[f"{stored.kind}, {stored.bits} bits" if stored else "drawn from shapes"] += 1
            self.ignored += checked.ignored
            for i, count in enumerate(checked.class_pixels):
                self.pixels[i] += count
                self.masks_with[i] += count > 0

    def values(self) -> dict:
        """The totals as JSON values."""
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
        splits: image counts by official split.
    """
    values = {**about, **tally.values(), "splits": splits, "notes": notes.lines, "warnings": notes.warnings}
    files.write_json(out / JSON, values)
    messages = [*notes.lines, *(f"warning: {text}" for text in notes.warnings)]
    files.write_text(out / TEXT, "\n".join([table(values), *([""] if messages else []), *messages]) + "\n")


def table(values: dict) -> str:
    """The card as text, without notes and warnings.

    Args:
        values: content of card.json.
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
            (entry["name"], str(entry["pixels"]), f"{entry['share_pct']:.2f} %", str(entry["images"]))
            for entry in values["classes"]
        ]
        classes.append(
            ("255 (ignore)", str(values["ignored"]["pixels"]), f"{values['ignored']['share_pct']:.2f} %", "")
        )
        lines += ["", log.table(classes)]
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:_SHOWN])
