"""Configuration: the same rules check recipes and flags, and every refusal names the value to change."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpp import config
from stpp.config import Config
from stpp.errors import UserError

RECIPES = sorted((Path(__file__).parents[1] / "launch" / "recipes").glob("*.toml"))


def parse(*args: str, default: Config | None = None) -> Config:
    return config.parse(Config, args, prog="stpp train", default=default)


@pytest.mark.parametrize(("args", "names"), [
    (["--train.epochs", "0"], ["--train.epochs is 0", "at least 1"]),
    (["--train.epochs", "many"], ["--train.epochs", "many"]),
    (["--train.epoch", "3"], ["--train.epoch", "--train.epochs"]),
    (["--augment.crop-px", "0"], ["--augment.crop-px is 0", "at least 1"]),
    (["--augment.long-side", "9", "3"], ["--augment.long-side is 9 3", "ordered"]),
    (["--method", "st+++"], ["st+++", "--method", "stpp"]),
    (["--model.output-stride", "4"], ["--model.output-stride", "4", "8"]),
    (["--train.lr", "nan"], ["--train.lr is nan"]),
    (["--data.val", "1.5"], ["--data.val is 1.5", "between 0 and 1"]),
    (["--seed", str(2**64)], ["--seed", "2^64"]),
    (["--train.lr", "inf"], ["--train.lr is inf"]),
    (["--seed"], ["--seed"]),
])
def test_impossible_flags_are_named_in_one_line(args, names):
    with pytest.raises(UserError) as refused:
        parse(*args)
    assert "\n" not in str(refused.value)
    for name in names:
        assert name in str(refused.value)


@pytest.mark.parametrize(("text", "names"), [
    ("[train]\nepochs = 0", ["--train.epochs is 0"]),
    ("[train]\nepoch = 3", ["--train.epoch"]),
    ("[trian]\nepochs = 3", ["--trian.epochs"]),
    ("[data]\nexif = 3", ["--data.exif"]),
    ("data = 3", ["--data"]),
    ("[train", ["TOML"]),
    ("seed = true", ["--seed"]),
])
def test_invalid_recipes_are_refused_like_flags_with_the_file(tmp_path, text, names):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        config.load_recipe(Config, path)
    assert "\n" not in str(refused.value)
    for name in [str(path), *names]:
        assert name in str(refused.value)


def test_flags_override_the_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'method = "st"\n[data]\nexif = false\nclasses = ["a b", "c"]\n[train]\nepochs = 7\nlr = 1e-2\n'
    )
    recipe = config.load_recipe(Config, path)
    assert (recipe.method, recipe.data.exif, recipe.data.classes) == ("st", False, ("a b", "c"))
    resolved = parse("--train.epochs", "3", default=recipe)
    assert (resolved.train.epochs, resolved.train.lr, resolved.method) == (3, 0.01, "st")


def test_a_run_can_be_repeated_from_its_config(tmp_path):
    ours = parse("--train.epochs", "3", "--data.root", "some where", "--augment.long-side", "5", "9",
                 "--data.no-exif")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict(ours)))
    assert config.load_recipe(Config, path) == ours


def test_differing_keys_omit_irrelevant_settings():
    ours = config.to_dict(parse("--train.epochs", "3", "--out", "a", "--control", "--data.threads", "2"))
    theirs = config.to_dict(parse("--train.epochs", "4", "--out", "b"))
    assert config.differing_keys(ours, theirs) == ["train.epochs: 4 -> 3"]


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8))
@settings(max_examples=150, deadline=None)
def test_any_json_is_accepted_or_refused_in_one_line(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_text(json.dumps(value))
    try:
        config.load_recipe(Config, path)
    except UserError as refused:
        assert "\n" not in str(refused)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_resolve(path):
    ran = subprocess.run([sys.executable, "-m", "stpp", "train", "--recipe", path, "--print-config"],
                         capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["train"]["epochs"] > 0
