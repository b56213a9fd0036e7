"""Budgets in steps, the ratio of the two lists, students that start from their teacher, recalibrated batch
norm."""

import json
from types import SimpleNamespace

import pytest
import torch

from cli_cases import ended
from run_cases import TINY
from stpp import checkpoint
from stpp.config import Config
from stpp.errors import UserError
from stpp.methods.st import joint
from stpp.settings import from_values


@pytest.mark.parametrize(("labelled", "pseudo", "ratio", "times"), [
    (4, 10, 1.0, 3), (4, 8, 1.0, 2), (4, 3, 1.0, 1), (4, 10, 0.5, 2), (4, 10, 0.01, 1), (4, 10, 2.0, 5)])
def test_labelled_entries_are_repeated_by_the_ratio(labelled, pseudo, ratio, times):
    run = SimpleNamespace(labelled=list(range(labelled)), labelled_ratio=ratio)
    found = joint(run, list(range(100, 100 + pseudo)))
    assert found == list(range(labelled)) * times + list(range(100, 100 + pseudo))


@pytest.mark.parametrize(("train", "per_epoch", "first", "others"), [
    ({"epochs": 3}, 5, 15, 15), ({"epochs": 3, "supervised_epochs": 7}, 5, 35, 15),
    ({"steps": 8}, 5, 8, 8), ({"steps": 8, "supervised_epochs": 2}, 5, 10, 8),
    ({"epochs": 2, "supervised_steps": 9}, 5, 9, 10), ({"steps": 8, "supervised_steps": 9}, 5, 9, 8)])
def test_steps_of_a_stage(train, per_epoch, first, others):
    config = from_values(Config, {"train": train}).train
    assert (config.stage_steps(per_epoch, supervised=True), config.stage_steps(per_epoch)) == (first, others)


@pytest.mark.parametrize(("train", "said"), [
    ({"steps": 0}, "--train.steps is 0: it must be at least 1"),
    ({"supervised_steps": 3, "supervised_epochs": 2},
     "--train.supervised-steps is 3: it must be given without"),
    ({"labelled_ratio": 0}, "--train.labelled-ratio is 0"),
    ({"recalibrate_bn": -1}, "--train.recalibrate-bn is -1")])
def test_impossible_budgets_are_named(train, said):
    with pytest.raises(UserError, match=said):
        from_values(Config, {"train": train})


@pytest.mark.slow
def test_run_by_steps_with_students_from_their_teacher(synthetic, synthetic_index, tmp_path, capsys):
    """The learning rate is so low that weights keep their initial values."""
    (tmp_path / "tiny.toml").write_text(TINY)
    run = tmp_path / "run"
    code, _, said = ended(
        capsys, "train", "--recipe", str(tmp_path / "tiny.toml"), "--data.root", str(synthetic),
        "--data.index", str(synthetic_index), "--out", str(run), "--device", "cpu",
        "--train.precision", "fp32", "--train.steps", "3", "--train.supervised-steps", "5",
        "--train.supervised-epochs", "None",
        "--train.lr", "1e-12", "--train.from-teacher", "--train.recalibrate-bn", "8", "--control")
    assert code == 0, said
    results = json.loads((run / "results.json").read_text())
    trained = [stage for stage in [*results["stages"], results["control"]] if stage["steps"]]
    steps = {stage["name"]: stage["steps"] for stage in trained}
    assert steps == {"1-supervised": 5, "4-retrain": 3, "6-retrain": 3, "control": 6}
    thirds = [checkpoint.load(run / "stages" / "1-supervised" / f"third-{i}.pt")["step"] for i in (1, 2, 3)]
    assert thirds == [1, 3, 5]
    first, second, last, control = (checkpoint.load(run / "stages" / name / "best.pt")["model"]
                                    for name in ("1-supervised", "4-retrain", "6-retrain", "control"))
    weights = [key for key, value in first.items() if value.is_floating_point() and "running" not in key]
    for other in (second, last, control):
        assert all(torch.allclose(other[key], first[key], atol=1e-6) for key in weights)
    kept, trained = first, checkpoint.load(run / "stages" / "1-supervised" / "last.pt")["model"]
    key = next(key for key in kept if key.endswith("running_mean"))
    assert not torch.equal(kept[key], trained[f"network.{key}"]), "what is kept has statistics of its own"
