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
    first = run.train("1-supervised", Supervised, few_twice(run.labelled), epochs=run.supervised_epochs)
    labels = run.label("2-label", first.best, run.unlabelled)
    run.train("3-retrain", Supervised, joint(run.labelled, labels))


def joint(labelled: Sequence[Sample], pseudo: Sequence[Sample]) -> list[Sample]:
    """One list: the labelled samples, repeated until they are no fewer than the pseudo-labelled ones, and
    these."""
    return list(labelled) * math.ceil(len(pseudo) / len(labelled)) + list(pseudo)
