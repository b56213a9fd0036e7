"""`stpp demo`: each method has settings, and torchrun receives a complete run."""

import dataclasses
import json
from typing import get_args, get_type_hints

import pytest

from cli_cases import ended, refused
from stpp import cli, config
from stpp.commands import demo, synthetic
from stpp.config import Config
from stpp.loading.sample import Stream
from stpp.loading.sampler import stage_samplers
from stpp.methods import METHODS

UNLABELLED = 388
"""400 pictures, of which 12 keep their labels."""


@pytest.fixture
def handed(monkeypatch) -> list[list[str]]:
    """Captures torchrun's arguments instead of starting it; data sets are small."""
    real, found = synthetic.generate, []
    monkeypatch.setattr(synthetic, "generate", lambda out, *, seed: real(out, seed=seed, train=20, val=2))
    monkeypatch.setattr(demo, "torchrun", lambda train: found.append(train) or 0)
    return found


@pytest.mark.parametrize("method", list(demo.DEMOS))
def test_each_method_has_settings_that_a_recipe_can_hold(method, tmp_path):
    assert get_args(get_type_hints(demo.Demo)["method"]) == tuple(demo.DEMOS)
    chosen = demo.DEMOS[method]
    (tmp_path / "recipe.json").write_text(json.dumps(config.to_dict(chosen)))
    assert config.load_recipe(Config, tmp_path / "recipe.json") == chosen and chosen.method == method
    assert chosen.model.backbone == "resnet18" and chosen.model.pretrained == "none"
    if METHODS[method].consistency:
        assert chosen.train.batch_global % (2 * demo.RANKS * chosen.train.accumulate) == 0
        streams = [Stream(samples=range(count), masked=False, number=number)
                   for number, count in enumerate((12, UNLABELLED))]
        sampler, _ = stage_samplers(streams, chosen.train.batch_global, seed=0, stage=1)
        # validated only at the end, as in the demonstration of ST++
        assert chosen.train.validate_every >= chosen.train.epochs and sampler.steps_per_epoch > 1


def test_recipe_is_written_and_passed_to_torchrun(handed, tmp_path, capsys):
    out = tmp_path / "demo"
    assert ended(capsys, "demo", "--out", out, "--method", "unimatch", "--seed", 2, "--control")[0] == 0
    (train,) = handed
    assert train[:3] == ["-m", "stpp", "train"] and train[-1] == "--control"
    written = config.load_recipe(Config, out / "recipe.json")
    expected = demo.DEMOS["unimatch"]
    assert written == dataclasses.replace(expected, seed=2,
                                          data=dataclasses.replace(expected.data, split_seed=2))
    assert (out / "data" / "classes.json").exists()
    ended(capsys, "demo", "--out", out, "--method", "unimatch", "--seed", 2)
    assert handed[1] == train[:-1]
    for more in (["--seed", 2], ["--seed", 1, "--method", "unimatch"], ["--seed", 2, "--method", "fixmatch"]):
        said = refused(capsys, "demo", "--out", out, *more)
        assert "holds a demo of another method, size, seed or version" in said
    assert len(handed) == 2


@pytest.mark.slow
def test_passed_command_runs(handed, tmp_path, monkeypatch, capsys):
    short = demo.DEMOS["unimatch"]
    short = dataclasses.replace(short, device="cpu", train=dataclasses.replace(
        short.train, epochs=2, batch_global=4, validate_every=2), data=dataclasses.replace(
        short.data, threads=1, loader="reference"))
    monkeypatch.setitem(demo.DEMOS, "unimatch", short)
    assert ended(capsys, "demo", "--out", tmp_path / "demo", "--method", "unimatch", "--control")[0] == 0
    cli.main(handed[0][2:])
    results = json.loads((tmp_path / "demo" / "run" / "results.json").read_text())
    # 8 unlabelled pictures of 20, 12 labels: the labels set the epoch
    assert [stage["steps"] for stage in (*results["stages"], results["control"])] == [6, 6]
