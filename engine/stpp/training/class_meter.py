"""Counts of a stage by class: pixels that a method labels itself while it trains, beside the labelled ones.

The device counts; the host reads the counts where it reads the loss anyway, and at the end of an epoch.
"""

from collections.abc import Callable, Sequence

import torch

from stpp import distributed, log
from stpp.training import class_shares
from stpp_kernels import class_pixels

TELLING = 1 / 3
"""Part of a stage's steps from which on a missing class is told: at first a network is sure of the frequent
classes alone."""


class ClassCounter:
    """Pixels of each class of the label maps of a step, on the device; counts nothing until it is told the
    number of classes."""

    def __init__(self):
        self._classes = 0
        self._total_C: torch.Tensor | None = None

    def watch(self, num_classes: int) -> None:
        """Counts from now on."""
        self._classes = num_classes

    @torch.no_grad()
    def add(self, labels_NHW: torch.Tensor) -> None:
        """Counts the classes of uint8 labels [N, H, W]; 255 is none. Nobody waits for the device."""
        if not self._classes:
            return
        found_C = class_pixels(labels_NHW, self._classes)
        self._total_C = found_C.clone() if self._total_C is None else self._total_C.add_(found_C)

    def take(self) -> list[int] | None:
        """Counts of all ranks since the last call, or None where nothing counts; every rank must call it."""
        total_C, self._total_C = self._total_C, None
        return None if total_C is None else distributed.sum_over_ranks(total_C).tolist()  # sync: seldom


class ClassMeter:
    """What a stage tells of its classes: shares of labelled and pseudo-labelled pixels, and those missing.

    Args:
        title: of the stage.
        counter: of the step.
        labelled: labelled pixels of each class; None: nothing is told.
        pseudo: pixels of each class in the pseudo labels that the stage trains on; None: it trains on none.
        tell: takes lines about missing classes, by class.
    """

    def __init__(self, title: str, counter: ClassCounter, *, classes: Sequence[str] = (),
                 labelled: Sequence[int] | None = None, pseudo: Sequence[int] | None = None,
                 tell: Callable[[dict[str, str]], None] = lambda _: None):
        self._title, self._classes, self._counter, self._tell = title, classes, counter, tell
        self._labelled, self._pseudo = labelled, pseudo
        self._confident: list[int] = []
        if labelled is not None:
            counter.watch(len(classes))

    def begin(self, metrics: log.Metrics, step: int) -> None:
        """Writes down what is known before the first step."""
        if self._pseudo is not None and self._labelled is not None and step == 0:
            metrics.by_class(step, class_shares.by_name(self._classes, self._labelled, self._pseudo,
                                                        "pseudo"))

    def look(self) -> None:
        """Takes the device's counts to the host; every rank must call it."""
        found = self._counter.take()
        if found is not None:
            self._confident = [a + b for a, b in zip(self._confident or [0] * len(found), found,
                                                     strict=True)]

    def epoch(self, metrics: log.Metrics, step: int, steps: int) -> None:
        """Writes down an epoch that ends after `step` of `steps` steps."""
        self.look()
        if self._confident and self._labelled is not None:
            metrics.by_class(step, class_shares.by_name(self._classes, self._labelled, self._confident,
                                                        "confident"))
            if step >= TELLING * steps:
                self._tell(class_shares.missing(self._classes, self._labelled, self._confident,
                                                "confident pixels of this epoch"))
        self._confident = []

    def state(self) -> list[int]:
        """Counts of an epoch that is not over, as of the last look."""
        return list(self._confident)

    def load(self, state: Sequence[int] | None) -> None:
        """Goes on from there."""
        self._confident = list(state or [])
