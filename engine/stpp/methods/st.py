"""ST: train on the labels, label the unlabelled images with that network, train again on both.

Source: ST++ (arXiv 2106.05095), section 3.2.
"""

import math
from collections.abc import Sequence

from stpp.loading.sample import Sample
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised, repeat_few


def train(run: Stages) -> None:
    """Runs three stages: train, label all, train again from the pretrained weights."""
    first = run.train("1-supervised", Supervised, repeat_few(run.labelled), supervised=True)
    labels = run.label("2-label", first.best, run.unlabelled)
    run.train("3-retrain", Supervised, joint(run, labels), teacher=first.best)


def joint(run: Stages, pseudo: Sequence[Sample]) -> list[Sample]:
    """Joins the labelled samples, repeated to at least `labelled_ratio` times the pseudo-labelled ones, with
    these."""
    times = math.ceil(run.labelled_ratio * len(pseudo) / len(run.labelled))
    return list(run.labelled) * max(1, times) + list(pseudo)
