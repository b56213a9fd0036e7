"""Training methods, one file each with its step and its stages; `METHODS` is their registry."""

from collections.abc import Callable
from dataclasses import dataclass

from stpp.methods import retrain, st, stpp, supervised, unimatch, unimatch_v2
from stpp.methods.stages import Stages


@dataclass(frozen=True, kw_only=True)
class Method:
    """Registry entry of a method."""

    run: Callable[[Stages], None]
    """Function that runs its stages, in order."""
    unlabelled: int = 1
    """Minimum number of unlabelled images; 0: the method uses none."""
    labels: bool = True
    """True if a stage labels images, so that `--label.max-pixels` applies."""
    predictors: int | None = None
    """Number of networks that rank or label images in a run, which may share one compiled engine."""
    consistency: bool = False
    """True if labels come from another view in the same step: neighbours are mixed, so that a pass needs an
    even number of images of each list, and `--train.from-teacher` puts a stage on the labels first."""
    advice: str = ""
    """Further flags to try for missing classes, appended to a list of flags."""
    checkpoints: int
    """Networks on the disk at the end, for the disk check: a training stage keeps its best network and, for
    resuming, its last one with momentum (counts as two), and writes a new file before it deletes the old one;
    thirds count extra."""


_OFFLINE = ", --label.keep-share 0.5 (the surest pixels of every class), --label.min-confidence auto"
_ONLINE = ", a lower --consistency.class-confidence for it (`stpp calibrate` proposes them)"

METHODS = {
    "supervised": Method(run=supervised.train, unlabelled=0, labels=False, checkpoints=5),
    "st": Method(run=st.train, predictors=1, advice=_OFFLINE, checkpoints=10),
    "stpp": Method(run=stpp.train, unlabelled=2, predictors=5, advice=_OFFLINE, checkpoints=18),
    "retrain": Method(run=retrain.train, labels=False, checkpoints=5),
    "unimatch": Method(run=unimatch.train, labels=False, consistency=True, advice=_ONLINE, checkpoints=5),
    "unimatch-v2": Method(run=unimatch_v2.train, labels=False, consistency=True, advice=_ONLINE,
                          checkpoints=8),
    "fixmatch": Method(run=unimatch_v2.train_fixmatch, labels=False, consistency=True, advice=_ONLINE,
                       checkpoints=8),
}
"""Methods by name on the command line (`stpp.config.MethodName`)."""
