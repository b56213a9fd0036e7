"""Methods: what is computed. One file each, with its step and its stages; `METHODS` has the facts about them."""

from collections.abc import Callable
from dataclasses import dataclass

from stpp.methods.retrain import retrain
from stpp.methods.st import st
from stpp.methods.stages import Stages
from stpp.methods.stpp import stpp
from stpp.methods.supervised import supervised


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, and what others need to know of it."""

    run: Callable[[Stages], None]
    """Its stages, in order."""
    unlabelled: int = 1
    """Unlabelled images that it needs at least; 0: it reads none."""
    labels: bool = True
    """Labels images, so that none may be larger than `--label.max-pixels`."""
    predictors: int | None = None
    """Networks that rank or label images in a run, which can share one compiled engine."""
    checkpoints: int
    """Networks on the disk at the end: a stage that trains keeps its best one and, to resume from, its last one with momentum
    (two), and writes one more before an old one goes; thirds come on top."""


METHODS = {
    "supervised": Method(run=supervised, unlabelled=0, labels=False, checkpoints=5),
    "st": Method(run=st, predictors=1, checkpoints=10),
    "stpp": Method(run=stpp, unlabelled=2, predictors=5, checkpoints=18),
    "retrain": Method(run=retrain, labels=False, checkpoints=5),
}
"""By their names on the command line (`stpp.config.Method`)."""
