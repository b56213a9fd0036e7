"""What a method may ask of the run that it is a part of. `stpp.run.run.Run` provides it; stages pass values,
not folder names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stpp.loading.sample import Sample
from stpp.training.step import Step


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a stage that trains leaves behind."""

    best: Path
    """Checkpoint of the deployed network: the teacher of later stages."""
    thirds: tuple[Path, ...] = ()
    """Checkpoints after a third, two thirds and all of the steps, if they were asked for."""


class Stages(Protocol):
    """Lists of a run, and its stages. A stage that is done is read from the disk instead of being done again.

    A stage's name is that of its folder below `stages/`; the number that it begins with keys its random
    numbers.
    """

    labelled: list[Sample]
    unlabelled: list[Sample]
    labelled_ratio: float
    """Labelled entries for each pseudo-labelled one in a list of both."""

    def train(self, name: str, step: type[Step], *lists: Sequence[Sample], teacher: Path | None = None,
              supervised: bool = False, keep_thirds: bool = False, key: int | None = None) -> Trained:
        """Trains a network from the pre-trained weights.

        Args:
            lists: passed to `Step.streams`.
            teacher: checkpoint of the network that labelled, from which it starts where the config says so.
            supervised: it is stage 1, on the labels alone, which may have a length of its own.
            keep_thirds: keep the weights after each third of the steps.
            key: of the random numbers; None: the number in the name.
        """

    def label(self, name: str, checkpoint: Path, samples: Sequence[Sample]) -> list[Sample]:
        """Labels samples with the network of a checkpoint: the same samples, with these masks, to be
        augmented strongly."""

    def select(self, name: str, checkpoints: Sequence[Path],
               samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """Ranks samples by how well checkpoints agree on them: the reliable half, and the rest."""

    def given(self) -> list[Sample]:
        """The unlabelled samples that have a mask in `--pseudo-labels`, with it."""
