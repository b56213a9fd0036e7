"""Retraining on labels and provided masks: pseudo labels of `stpp label` or of a run, reviewed or corrected
by the user."""

from stpp.methods.st import joint
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised

LAST_STAGE = 6
"""Key of the random numbers: that of ST++'s last stage, which this stage corresponds to."""


def train(run: Stages) -> None:
    """Runs one stage on the labels and the masks of `--pseudo-labels`."""
    run.train("1-retrain", Supervised, joint(run, run.provided_masks()), key=LAST_STAGE)
