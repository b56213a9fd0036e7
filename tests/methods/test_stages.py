"""Stages of the methods, recorded by a run that computes nothing: which network labels which images, and what
is trained on."""

from types import SimpleNamespace

import pytest

from stpp.methods import METHODS
from stpp.methods.stages import Trained

LABELLED, RELIABLE, REST = ["a", "b"], ["u2", "u4"], ["u1", "u3"]


class Recorder(SimpleNamespace):
    """Run whose networks and masks are words: "u1 by 4-retrain" is u1, labelled by that stage's network."""

    labelled, unlabelled, labelled_ratio = LABELLED, sorted(RELIABLE + REST), 1.0

    def train(self, name, step, *lists, teacher=None, **_):
        self.trained[name] = (sorted({sample for samples in lists for sample in samples}), teacher)
        return Trained(best=name, thirds=(f"{name} 1", f"{name} 2", name))

    def label(self, name, checkpoint, samples):
        return [f"{sample} by {checkpoint}" for sample in samples]

    def select(self, name, checkpoints, samples):
        assert samples == self.unlabelled and len(checkpoints) == 3
        return RELIABLE, REST


def trained(method: str, *, relabel: bool = False, from_teacher: bool = False) -> dict:
    run = Recorder(trained={}, relabel=relabel, from_teacher=from_teacher)
    METHODS[method].run(run)
    return run.trained


@pytest.mark.parametrize("relabel", [False, True])
def test_stpp_trains_on_reliable_images_then_on_all(relabel):
    stages = trained("stpp", relabel=relabel)
    first = [f"{name} by 1-supervised" for name in RELIABLE]
    assert stages["1-supervised"] == (LABELLED, None)
    assert stages["4-retrain"] == ([*LABELLED, *first], "1-supervised")
    second = "4-retrain" if relabel else "1-supervised"
    both = [f"{name} by {second}" for name in RELIABLE] + [f"{name} by 4-retrain" for name in REST]
    assert stages["6-retrain"] == (sorted([*LABELLED, *both]), "4-retrain")


def test_st_trains_on_all_images_at_once():
    stages = trained("st")
    assert list(stages) == ["1-supervised", "3-retrain"]
    assert stages["3-retrain"] == (
        sorted([*LABELLED, *(f"{name} by 1-supervised" for name in RELIABLE + REST)]), "1-supervised")


@pytest.mark.parametrize("method", ["unimatch", "unimatch-v2", "fixmatch"])
@pytest.mark.parametrize("from_teacher", [False, True])
def test_consistency_methods_may_begin_with_the_labels(method, from_teacher):
    stages = trained(method, from_teacher=from_teacher)
    everything = sorted([*LABELLED, *RELIABLE, *REST])
    if from_teacher:
        assert stages == {"1-supervised": (LABELLED, None), f"2-{method}": (everything, "1-supervised")}
    else:
        assert stages == {f"1-{method}": (everything, None)}
