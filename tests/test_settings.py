"""Settings from plain values and from flags: both accept the same values, and a refusal names its value in
one line."""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from stpp import config
from stpp.config import Config
from stpp.errors import UserError
from stpp.settings import allowed_values, argument_error, converted, flag, flatten, from_values, setting_types

# A flag's value that starts with a dash must be joined with `=`, which a list cannot be.
TEXT = st.text(min_size=1, max_size=6).filter(lambda text: not text.startswith("-"))
PLAIN = (st.none() | st.booleans() | st.integers(-5, 5) | st.integers() | st.floats() | TEXT
         | st.sampled_from(["None", "1/8", "voc", "st", "auto", "8", "true", "1e-3", "imagenet"]))
VALUES = PLAIN | st.lists(PLAIN, max_size=3)


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    """One field of every type."""

    whole: int = 1
    number: float = 1.5
    text: str = "text"
    path: Path = Path("path")
    switch: bool = True
    choice: Literal["a", 8, "b"] = "a"
    pair: tuple[int, float] = (1, 2.0)
    words: tuple[str, ...] = ()
    paths: tuple[Path, ...] = ()
    perhaps: float | None = None
    perhaps_text: str | None = "set"
    perhaps_choice: Literal[8, 16] | None = None


@dataclass(frozen=True, kw_only=True)
class House:
    """Section of settings."""

    seed: int = 0
    kitchen_sink: Kitchen = field(default_factory=Kitchen)


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Flags, some of them required."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path
    checkpoints: tuple[Path, ...]
    switch: bool = False
    pair: tuple[int, int] = (1, 2)


def as_flags(key: str, value: object) -> list[str]:
    """Converts a plain value to its command line."""
    if isinstance(value, bool):
        section, dot, name = key.replace("_", "-").rpartition(".")
        return [f"--{section}{dot}{name}" if value else f"--{section}{dot}no-{name}"]
    if isinstance(value, list):
        return [flag(key), *map(str, value)]
    return [f"{flag(key)}={value}"]


def nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def outcome(action) -> object:
    """Returns an action's result, or the line of its refusal; nan never equals itself."""
    try:
        return repr(action())
    except UserError as refused:
        assert "\n" not in str(refused)
        return str(refused)


def test_refused_value_with_a_line_break_is_one_line():
    assert outcome(lambda: Config(pseudo_labels=Path("a\nb"))).startswith('--pseudo-labels is "a\\nb":')


@pytest.mark.parametrize("cls", [House, Config])
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_plain_values_and_flags_give_the_same_settings(cls, data):
    types = setting_types(cls)
    key = data.draw(st.sampled_from(sorted(types)))
    value = data.draw(VALUES)
    try:
        converted(types[key], value)
    except ValueError:
        with pytest.raises(UserError, match=flag(key)):
            from_values(cls, nested(key, value))
        return
    told = outcome(lambda: from_values(cls, nested(key, value)))
    assert told == outcome(lambda: config.parse(cls, as_flags(key, value), prog="stpp"))


def test_every_boolean_setting_has_two_flags():
    types = setting_types(Config)
    switches = [key for key in types if bool in (types[key], *get_args(types[key]))]
    assert "data.exif" in switches
    for key, value in itertools.product(switches, (False, True)):
        told = outcome(lambda: config.parse(Config, as_flags(key, value), prog="stpp"))  # noqa: B023
        assert told == outcome(lambda: from_values(Config, nested(key, value)))  # noqa: B023


ARGUMENTS = ["--out", "--checkpoints", "--switch", "--no-switch", "--pair", "--out=x", "--switch=y",
             "--pair=3",
             "--nope", "--no-out", "x", "3", "", "-1", "-x", "--", "--pa", "None", "é\n"]


@given(st.lists(st.sampled_from(ARGUMENTS), max_size=7))
@settings(max_examples=100, deadline=None)
def test_any_arguments_are_accepted_or_refused_in_one_line(args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stpp.settings.argument_error",
                      lambda *given: (asked.append(given), argument_error(*given))[1])
        asked = []
        try:
            found = config.parse(Tool, args, prog="stpp tool")
        except UserError as refused:
            assert "\n" not in str(refused) and "not understood" not in str(refused) and asked
        else:
            assert isinstance(found, Tool) and not asked


@pytest.mark.parametrize(("args", "line"), [
    (["--pair", "1"], "--pair is 1: it must be 2 values, each a whole number"),
    (["--pair", "1", "b"], "--pair is 1 b: it must be 2 values, each a whole number"),
    (["--pair"], "--pair needs a value"),
    (["--out"], "--out needs a value"),
    ([], "--out and --checkpoints are missing"),
    (["photo.png", "--out", "x"], "--checkpoints is missing"),
    (["x", "--checkpoints", "--out=x", "--switch=y"],
     "--switch takes no value, got y; --no-switch turns it off"),
    (["--outt", "x"], "there is no setting --outt; did you mean --out?"),
    (["--checkpoints", "a", "b", "--out", "x", "--zebra"], "there is no setting --zebra"),
])
def test_mistakes_are_named(args, line):
    with pytest.raises(UserError) as refused:
        config.parse(Tool, args, prog="stpp tool")
    assert str(refused.value) == line


@pytest.mark.parametrize(("values", "line"), [
    ({"seed": "3"}, '--seed is "3": it must be a whole number'),
    ({"seed": 3.0}, "--seed is 3.0: it must be a whole number"),
    ({"seed": True}, "--seed is true: it must be a whole number"),
    ({"seed": {"a": 1}}, "there is no setting --seed.a; did you mean --seed?"),
    ({"kitchen-sink": {"pair": [1]}}, "--kitchen-sink.pair is [1]: it must be 2 values, each a whole number"),
    ({"kitchen_sink": {"choice": "8"}}, '--kitchen-sink.choice is "8": it must be one of a, 8, b'),
    ({"kitchen_sink": {"words": "one"}}, '--kitchen-sink.words is "one": it must be a list, each text'),
    ({"kitchen_sink": {"perhaps": "low"}}, '--kitchen-sink.perhaps is "low": it must be a number'),
    ({"kitchen_sink": 3},
     "--kitchen-sink is a section, not a setting; use a setting in it, such as --kitchen-sink.whole"),
    ({"kitchen": {"whole": 3}},
     "there is no setting --kitchen.whole; did you mean --kitchen-sink.whole or --kitchen-sink.choice?"),
    ({"kitchen_sink": {"whole": 3}, "kitchen-sink": {"whole": 3}},
     "--kitchen-sink.whole is set twice, spelled with - and with _; keep one"),
    ({"seed": "a\nb"}, '--seed is "a\\nb": it must be a whole number'),
    ({"x" * 500: 3}, f"there is no setting --{'x' * 78}..."),
])
def test_values_of_wrong_type_are_named(values, line):
    with pytest.raises(UserError) as refused:
        from_values(House, values)
    assert str(refused.value) == line


def test_values_take_the_types_of_their_fields():
    values = {"number": 3, "text": 0.125, "path": "a b", "pair": [4, 5], "paths": ["x", "y"], "switch": False,
              "perhaps_text": None, "perhaps_choice": 16}
    found = from_values(House, {"kitchen-sink": values}).kitchen_sink
    assert (found.number, found.text, found.path, found.pair) == (3.0, "0.125", Path("a b"), (4, 5.0))
    assert isinstance(found.number, float) and isinstance(found.pair[1], float)
    assert (found.paths, found.perhaps_text) == ((Path("x"), Path("y")), None)
    assert (found.perhaps_choice, found.switch) == (16, False)
    assert from_values(House, {}) == House()
    with pytest.raises(ValueError):
        converted(float, 10**400)
    assert math.isnan(converted(float | None, math.nan))


def test_every_setting_has_a_known_type():
    types = setting_types(Config)
    assert types.keys() == flatten(config.to_dict(Config())).keys()
    assert all(allowed_values(annotation) for annotation in types.values())


def test_recipe_may_start_with_a_byte_order_mark(tmp_path):
    for name, text in (("a.toml", "seed = 7"), ("a.json", json.dumps({"seed": 7}))):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert config.load_recipe(Config, tmp_path / name).seed == 7


def test_lists_in_recipes_cannot_hold_flags(tmp_path):
    (tmp_path / "a.toml").write_text('[data]\nclasses = ["--seed=5", "--help"]')
    found = config.load_recipe(Config, tmp_path / "a.toml")
    assert found.data.classes == ("--seed=5", "--help") and found.seed == 0


def test_home_folder_of_paths_is_expanded(monkeypatch, tmp_path):
    """A shell leaves `~` in `--out=~/runs`, and in a recipe."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = config.parse(Config, ["--out=~/runs", "--data.unlabelled", "~/a", "b/~c"], prog="stpp train")
    assert parsed.out == tmp_path / "runs" and parsed.data.unlabelled == (tmp_path / "a", Path("b/~c"))
    assert from_values(Config, {"data": {"root": "~/data"}}).data.root == tmp_path / "data"
    assert config.parse(Config, ["--out=~no-such-user/x"], prog="stpp train").out == Path("~no-such-user/x")
