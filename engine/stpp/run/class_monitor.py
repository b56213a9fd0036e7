"""Monitor of a run's classes: warns of classes that are scarce in the labels, or lost during training."""

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
"""Validation IoU, in percent, below which a class counts as lost."""
SHOWN = 8
"""Maximum classes with figures in a warning; further ones are only named."""


@dataclass(kw_only=True)
class ClassMonitor:
    """Class statistics of a run, and warnings about them."""

    classes: Sequence[str]
    labelled: list[int]
    """Pixels of each class in the labelled list."""
    images: list[int]
    """Number of labelled images that show each class."""
    validated: list[int]
    """Pixels of each class in the validation list."""
    advice: str = ""
    """Remedies of the method, besides those for all methods."""
    _warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, index: Index, labelled: Sequence[Sample], val: Sequence[Sample], *,
           advice: str) -> "ClassMonitor":
        """Makes the monitor of a run's lists."""
        by_image = index.class_pixels(labelled)

        def total(counts: Sequence[Sequence[int]]) -> list[int]:
            return [sum(column) for column in zip(*counts, strict=True)] or [0] * len(index.classes)

        return cls(classes=index.classes, labelled=total(by_image), validated=total(index.class_pixels(val)),
                   images=total([[int(count > 0) for count in row] for row in by_image]), advice=advice)

    def warn_scarce(self, where: Path, notes: Notes) -> None:
        """Warns of classes without a labelled pixel, and notes classes in one image only.

        Args:
            where: path of the labelled list.
        """
        absent = [name for name, images in zip(self.classes, self.images, strict=True) if not images]
        once = [name for name, images in zip(self.classes, self.images, strict=True) if images == 1]
        if absent and len(absent) < len(self.classes):
            notes.warn(f"{where}: no labelled pixel of {', '.join(absent)}: "
                       f"{'it' if len(absent) == 1 else 'they'} cannot be learned; label an image that shows "
                       f"{'it' if len(absent) == 1 else 'them'}")
        if once and sum(self.images) and max(self.images) > 1:
            notes.line(f"{where}: only one image shows {', '.join(once)}: the network learns "
                       f"{'it' if len(once) == 1 else 'them'} from that image alone; label more images that "
                       "do")

    def warn_missing(self, pixels: Sequence[int], what: str) -> None:
        """Warns of classes that are in the labels and nearly absent from the counted pixels."""
        self.warn(class_shares.missing(self.classes, self.labelled, pixels, what))

    def warn_lost(self, stage: str, iou: Mapping[str, float]) -> None:
        """Warns of classes that the network of a stage does not find in the validation images."""
        shares = class_shares.percent(self.labelled)
        self.warn({name: f"class {name} has an IoU of {iou[name]:.2f} % after {stage}; it has {share:.3g} % "
                         f"of the labelled pixels, in {counted(images, 'image')}"
                   for name, share, images, pixels in zip(self.classes, shares, self.images, self.validated,
                                                          strict=True)
                   if pixels and images and iou.get(name, 100.0) < LOST_PCT})

    def warn(self, lines: Mapping[str, str]) -> None:
        """Logs warnings by class, each class once in a run, and the remedies."""
        new = {name: text for name, text in lines.items() if name not in self._warned}
        self._warned |= new.keys()
        texts = dict.fromkeys(new.values())
        for text in list(texts)[:SHOWN]:
            log.say(f"warning: {text}")
        if len(texts) > SHOWN:
            log.say(f"warning: the same holds for {', '.join(list(new)[SHOWN:])}")
        if new:
            log.say(f"  to try: {class_shares.REMEDIES}{self.advice}; {class_shares.GUIDE}")


def pseudo_pixels(samples: Sequence[Sample], stages: Path, provided: Path) -> list[int] | None:
    """Sums the pixels of each class in the samples' pseudo labels; None if there are no labels or counts.

    Args:
        stages: folder of a run's stages, where the `summary.json` of a labelling has its counts.
        provided: file with the counts of the masks of `--pseudo-labels`.
    """
    folders: dict[str, Path] = {}
    for sample in samples:
        if sample.strong and sample.mask is not None and sample.mask.startswith(f"{stages}/"):
            name = sample.mask[len(f"{stages}/"):].partition("/")[0]
            folders.setdefault(name, stages / name / "summary.json")
        elif sample.strong and sample.mask is not None:
            folders.setdefault("", provided)
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
