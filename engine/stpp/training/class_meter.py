"""Class counts of a training stage: pixels that a method labels during training, and labelled pixels.

Counting runs on the device; the host reads the counts together with the loss, and at the end of an epoch.
"""

from collections.abc import Callable, Sequence

import torch

from stpp import distributed, log
from stpp.training import class_shares
from stpp_kernels import class_pixels

WARN_FROM = 1 / 3
"""Share of a stage's steps before the first warning of a missing class: at first a network is confident only
of frequent classes."""


class ClassCounter:
    """Counter of the pixels of each class in a step's label maps, on the device; off until `enable`."""

    def __init__(self):
        self._classes = 0
        self._total_C: torch.Tensor | None = None

    def enable(self, num_classes: int) -> None:
        """Starts counting."""
        self._classes = num_classes

    @torch.no_grad()
    def add(self, labels_NHW: torch.Tensor) -> None:
        """Counts the classes of uint8 labels [N, H, W], without 255; does not wait for the device."""
        if not self._classes:
            return
        pixels_C = class_pixels(labels_NHW, self._classes)
        self._total_C = pixels_C.clone() if self._total_C is None else self._total_C.add_(pixels_C)

    def take(self) -> list[int] | None:
        """Returns the counts of all ranks since the last call, or None if off; every rank must call it."""
        total_C, self._total_C = self._total_C, None
        return None if total_C is None else distributed.sum_over_ranks(total_C).tolist()  # sync: seldom


class ClassMeter:
    """Class metrics of a stage: shares of labelled and pseudo-labelled pixels, and missing classes.

    Args:
        title: title of the stage.
        counter: counter of the step.
        labelled: labelled pixels of each class; None: no class metrics.
        pseudo: pixels of each class in the stage's pseudo labels; None: the stage has none.
        warn: called with warnings about missing classes, by class.
    """

    def __init__(self, title: str, counter: ClassCounter, *, classes: Sequence[str] = (),
                 labelled: Sequence[int] | None = None, pseudo: Sequence[int] | None = None,
                 warn: Callable[[dict[str, str]], None] = lambda _: None):
        self._title, self._classes, self._counter, self._warn = title, classes, counter, warn
        self._labelled, self._pseudo = labelled, pseudo
        self._confident: list[int] = []
        if labelled is not None:
            counter.enable(len(classes))

    def begin(self, metrics: log.Metrics, step: int) -> None:
        """Writes the metrics that are known before the first step."""
        if self._pseudo is not None and self._labelled is not None and step == 0:
            metrics.by_class(step, class_shares.by_name(self._classes, self._labelled, self._pseudo,
                                                        "pseudo"))

    def collect(self) -> None:
        """Adds the device's counts to those on the host; every rank must call it."""
        counts = self._counter.take()
        if counts is not None:
            self._confident = [a + b for a, b in zip(self._confident or [0] * len(counts), counts,
                                                     strict=True)]

    def end_epoch(self, metrics: log.Metrics, step: int, steps: int) -> None:
        """Writes the metrics of an epoch, or of the stage's last part of one, that ends after `step` of
        `steps` steps."""
        self.collect()
        if self._confident and self._labelled is not None:
            metrics.by_class(step, class_shares.by_name(self._classes, self._labelled, self._confident,
                                                        "confident"))
            if step >= WARN_FROM * steps:
                self._warn(class_shares.missing(self._classes, self._labelled, self._confident,
                                                "confident pixels of this epoch"))
        self._confident = []

    def state(self) -> list[int]:
        """Counts of the current epoch, as of the last `collect`."""
        return list(self._confident)

    def load(self, state: Sequence[int] | None) -> None:
        """Restores the counts of `state`."""
        self._confident = list(state or [])
