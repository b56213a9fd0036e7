"""Interface of a run for its method, implemented by `stpp.run.run.Run`; stages pass values, not folder
names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stpp.loading.sample import Sample
from stpp.training.step import Step


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Checkpoints of a training stage."""

    best: Path
    """Checkpoint of the deployed network: the teacher of later stages."""
    thirds: tuple[Path, ...] = ()
    """Checkpoints after a third, two thirds and all of the steps, if requested."""


class Stages(Protocol):
    """Lists and stages of a run. Finished stages are read from the disk instead of being run again.

    A stage's name is that of its folder below `stages/`; its leading number is the key of its random numbers.
    """

    labelled: list[Sample]
    unlabelled: list[Sample]
    labelled_ratio: float
    """Minimum ratio of labelled to pseudo-labelled entries in a joint list."""
    relabel: bool
    """The second round of ST++ labels the images of the first one again."""
    from_teacher: bool
    """Initial weights of later stages: those of their teacher, not the pretrained ones."""

    def train(self, name: str, step: type[Step], *lists: Sequence[Sample], teacher: Path | None = None,
              supervised: bool = False, keep_thirds: bool = False, key: int | None = None) -> Trained:
        """Trains a network from the pretrained weights.

        Args:
            lists: passed to `Step.streams`.
            teacher: checkpoint of the labelling network; initial weights if `from_teacher` is set.
            supervised: the stage is stage 1, on labels alone, which may have its own length.
            keep_thirds: save the weights after each third of the steps.
            key: key of the random numbers; None: the number in the name.
        """

    def label(self, name: str, checkpoint: Path, samples: Sequence[Sample]) -> list[Sample]:
        """Labels samples with a checkpoint; returns them with these masks, marked for strong augmentation."""

    def select(self, name: str, checkpoints: Sequence[Path],
               samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Ranks samples by the agreement of checkpoints; returns the reliable half, and the rest."""

    def provided_masks(self) -> list[Sample]:
        """Returns the unlabelled samples that have a mask in `--pseudo-labels`, with that mask."""
