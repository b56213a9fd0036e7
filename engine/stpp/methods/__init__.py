"""Methods: what is computed. One file each, with its step and its stages; `METHODS` has the facts about
them."""

from collections.abc import Callable
from dataclasses import dataclass

from stpp.methods import retrain, st, stpp, supervised, unimatch, unimatch_v2
from stpp.methods.stages import Stages


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
    pairs: bool = False
    """Mixes neighbours of a pass, so that a pass holds an even number of images of each list."""
    advice: str = ""
    """What else to try where a class goes missing: the end of a list of flags."""
    checkpoints: int
    """Networks on the disk at the end: a stage that trains keeps its best one and, to resume from, its last
    one with momentum (two), and writes one more before an old one goes; thirds come on top."""


_OFFLINE = ", --label.keep-share 0.5 (the surest pixels of every class), --label.min-confidence auto"
_ONLINE = ", a lower --consistency.class-confidence for it (`stpp calibrate` proposes them)"

METHODS = {
    "supervised": Method(run=supervised.train, unlabelled=0, labels=False, checkpoints=5),
    "st": Method(run=st.train, predictors=1, advice=_OFFLINE, checkpoints=10),
    "stpp": Method(run=stpp.train, unlabelled=2, predictors=5, advice=_OFFLINE, checkpoints=18),
    "retrain": Method(run=retrain.train, labels=False, checkpoints=5),
    "unimatch": Method(run=unimatch.train, labels=False, pairs=True, advice=_ONLINE, checkpoints=5),
    "unimatch-v2": Method(run=unimatch_v2.train, labels=False, pairs=True, advice=_ONLINE, checkpoints=8),
    "fixmatch": Method(run=unimatch_v2.train_fixmatch, labels=False, pairs=True, advice=_ONLINE,
                       checkpoints=8),
}
"""By their names on the command line (`stpp.config.MethodName`)."""
