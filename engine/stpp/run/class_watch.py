"""Watch of a run over its classes: which are scarce in its labels, and which go missing on the way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stpp import log
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.loading.sample import Sample
from stpp.training import class_shares

LOST_PCT = 1.0
"""A class is lost whose validation IoU, percent, is below this."""
SHOWN = 8
"""Classes that a warning tells figures of, at most; others are named."""


@dataclass(kw_only=True)
class ClassWatch:
    """The classes of a run, and what was said of them."""

    classes: Sequence[str]
    labelled: list[int]
    """Pixels of each class in the labelled list."""
    images: list[int]
    """Labelled images that show each class."""
    validated: list[int]
    """Pixels of each class in the validation list."""
    advice: str = ""
    """What to try besides the remedies that every method has."""
    _told: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, index: Index, labelled: Sequence[Sample], val: Sequence[Sample], *,
           advice: str) -> "ClassWatch":
        """The watch over the lists of a run."""
        by_image = index.class_pixels(labelled)

        def total(rows: Sequence[Sequence[int]]) -> list[int]:
            return [sum(column) for column in zip(*rows, strict=True)] or [0] * len(index.classes)

        return cls(classes=index.classes, labelled=total(by_image), validated=total(index.class_pixels(val)),
                   images=total([[int(count > 0) for count in row] for row in by_image]), advice=advice)

    def name_scarce(self, where: Path, notes: Notes) -> None:
        """Names the classes that nothing can be learned of, and those that one image alone shows.

        Args:
            where: the labelled list.
        """
        absent = [name for name, images in zip(self.classes, self.images, strict=True) if not images]
        once = [name for name, images in zip(self.classes, self.images, strict=True) if images == 1]
        if absent and len(absent) < len(self.classes):
            notes.warn(f"{where}: no labelled pixel of {', '.join(absent)}: "
                       f"{'it' if len(absent) == 1 else 'they'} cannot be learned; label an image that shows "
                       f"{'it' if len(absent) == 1 else 'them'}")
        if once and sum(self.images) and max(self.images) > 1:
            notes.line(f"{where}: one image alone shows {', '.join(once)}: what is learned of "
                       f"{'it' if len(once) == 1 else 'them'} is that image; label more that do")

    def missing(self, found: Sequence[int], what: str) -> None:
        """Names the classes that are in the labels and nearly absent from what was found."""
        self.tell(class_shares.missing(self.classes, self.labelled, found, what))

    def lost(self, stage: str, iou: Mapping[str, float]) -> None:
        """Names the classes that the network of a stage does not find in the validation images."""
        shares = class_shares.percent(self.labelled)
        self.tell({name: f"class {name} has an IoU of {iou[name]:.2f} % after {stage}; it has {share:.3g} % "
                         f"of the labelled pixels, in {counted(images, 'image')}"
                   for name, share, images, there in zip(self.classes, shares, self.images, self.validated,
                                                         strict=True)
                   if there and images and iou.get(name, 100.0) < LOST_PCT})

    def tell(self, lines: Mapping[str, str]) -> None:
        """Warns of classes, of each once in a run, and says what to try."""
        fresh = {name: text for name, text in lines.items() if name not in self._told}
        self._told |= fresh.keys()
        for text in list(fresh.values())[:SHOWN]:
            log.say(f"warning: {text}")
        if len(fresh) > SHOWN:
            log.say(f"warning: and so {', '.join(list(fresh)[SHOWN:])}")
        if fresh:
            log.say(f"  to try: {class_shares.REMEDIES}{self.advice}; {class_shares.GUIDE}")


def pseudo_pixels(samples: Sequence[Sample], stages: Path, given: Path) -> list[int] | None:
    """Pixels of each class in the pseudo labels among these samples; None where there are none, or nobody
    counted them.

    Args:
        stages: folder of a run's stages: a labelling's `summary.json` has its counts.
        given: what was found in the masks of `--pseudo-labels`.
    """
    folders: dict[str, Path] = {}
    for sample in samples:
        if sample.strong and sample.mask is not None and sample.mask.startswith(f"{stages}/"):
            name = sample.mask[len(f"{stages}/"):].partition("/")[0]
            folders.setdefault(name, stages / name / "summary.json")
        elif sample.strong and sample.mask is not None:
            folders.setdefault("", given)
    total: list[int] = []
    for path in folders.values():
        try:
            counts = json.loads(path.read_text(encoding="utf-8")).get("class_pixels")
        except (OSError, ValueError):
            counts = None
        if not counts:
            return None
        total = [a + b for a, b in zip(total, counts, strict=True)] if total else list(counts)
    return total or None
