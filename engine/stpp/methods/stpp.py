"""ST++: ST in two rounds, first on images whose predictions were stable while the first network trained.

Source: ST++ (arXiv 2106.05095), section 3.3.
"""

from stpp.methods.st import joint
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised, repeat_few


def train(run: Stages) -> None:
    """Runs six stages; each training starts from the pretrained weights, or with `--train.from-teacher` from
    those of its teacher."""
    first = run.train("1-supervised", Supervised, repeat_few(run.labelled), supervised=True, keep_thirds=True)
    reliable, rest = run.select("2-select", first.thirds, run.unlabelled)
    easy = run.label("3-label", first.best, reliable)
    second = run.train("4-retrain", Supervised, joint(run, easy), teacher=first.best)
    if run.relabel:
        pseudo = run.label("5-label", second.best, run.unlabelled)
    else:
        pseudo = easy + run.label("5-label", second.best, rest)
    run.train("6-retrain", Supervised, joint(run, pseudo), teacher=second.best)
