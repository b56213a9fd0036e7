"""Retraining on labels and masks that the user gives: pseudo labels of `stpp label` or of a run, looked at or
corrected."""

from stpp.methods.st import joint
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised

LAST_STAGE = 6
"""Key of the random numbers: those of ST++'s last stage, which this is on masks from elsewhere."""


def train(run: Stages) -> None:
    """Trains once, on the labels and the masks of `--pseudo-labels`."""
    run.train("1-retrain", Supervised, joint(run, run.given()), key=LAST_STAGE)
