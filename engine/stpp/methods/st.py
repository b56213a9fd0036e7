"""ST: train on the labels, label the rest with that network, train again on both.

Source: ST++ (arXiv 2106.05095), section 3.2.
"""

import math
from collections.abc import Sequence

from stpp.loading.sample import Sample
from stpp.methods.stages import Stages
from stpp.methods.supervised import Supervised, few_twice


def train(run: Stages) -> None:
    """Three stages: train, label all, train again from the pre-trained weights."""
    first = run.train("1-supervised", Supervised, few_twice(run.labelled), supervised=True)
    labels = run.label("2-label", first.best, run.unlabelled)
    run.train("3-retrain", Supervised, joint(run, labels), teacher=first.best)


def joint(run: Stages, pseudo: Sequence[Sample]) -> list[Sample]:
    """One list: the labelled samples, repeated until they are no fewer than the pseudo-labelled ones (times
    the ratio that was asked for), and these."""
    times = math.ceil(run.labelled_ratio * len(pseudo) / len(run.labelled))
    return list(run.labelled) * max(1, times) + list(pseudo)
