"""`stpp recipes`, and the recipes: all resolve; the published ones have the published values and correct
headers."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch

from cli_cases import ended, refused
from stpp import cli, config
from stpp.commands import recipes, train
from stpp.config import AugmentConfig, Config, tomllib
from stpp.dataset import splits
from stpp.dataset.classes import class_list
from stpp.loading.sample import Stream
from stpp.loading.sampler import StepSampler, stage_samplers
from stpp.models.build import network_of

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
# Classes, learning rate of the backbone at a batch of 16, epochs, crop, long side; from the paper and its
# public code.
PUBLISHED = {"pascal": (21, 0.001, 80, 321, (200, 800)), "cityscapes": (19, 0.004, 240, 721, (1024, 4096))}
TRAINING_IMAGES = {"pascal": 10582, "cityscapes": 2975}
MIOU = {
    "pascal": ["1/16 72.6", "1/8 74.4", "1/4 75.4", "1/16 74.5", "1/8 76.3", "1/4 76.6", "92 65.2",
               "183 71.0", "366 74.6",
               "732 77.3", "1464 79.1"],
    "cityscapes": ["1/30 61.4", "1/8 72.7", "1/4 73.8"],
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_resolves_and_flags_override_it(path, tmp_path, capsys):
    def printed(*flags: str) -> dict:
        cli.main(["train", "--recipe", str(path), *flags, "--print-config"])
        return json.loads(capsys.readouterr().out)

    told = tomllib.loads(path.read_text(encoding="utf-8"))
    resolved = printed()
    assert {key: config.flatten(resolved)[key] for key in config.flatten(told)} == config.flatten(told)
    assert resolved.keys() == {field.name for field in dataclasses.fields(Config)}
    changed = printed("--train.epochs", "3")
    assert changed["train"].pop("epochs") == 3 and changed["train"].pop("steps") is None
    del resolved["train"]["epochs"], resolved["train"]["steps"]
    assert changed == resolved
    whole = tmp_path / "config.json"  # the printed configuration is itself a recipe
    whole.write_text(json.dumps(printed()))
    assert config.to_dict(config.load_recipe(Config, whole)) == printed()


@pytest.mark.parametrize("flags,lengths", [
    ((), dict(epochs=5, steps=700, supervised_steps=300, supervised_epochs=None)),
    (("--train.epochs", "3"), dict(epochs=3, steps=None, supervised_steps=300, supervised_epochs=None)),
    (("--train.epochs=3", "--train.steps", "9"),
     dict(epochs=3, steps=9, supervised_steps=300, supervised_epochs=None)),
    (("--train.supervised_epochs", "2"),
     dict(epochs=5, steps=700, supervised_steps=None, supervised_epochs=2)),
])
def test_length_on_the_command_line_replaces_the_recipes(flags, lengths, tmp_path, capsys):
    """Else `--train.epochs 3` over a recipe in steps would change nothing, without a word."""
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nepochs = 5\nsteps = 700\nsupervised_steps = 300\n")
    cli.main(["train", "--recipe", str(path), *flags, "--print-config"])
    train = json.loads(capsys.readouterr().out)["train"]
    assert {name: train[name] for name in lengths} == lengths
    path.write_text("[train]\nsupervised_epochs = 2\n")
    cli.main(["train", "--recipe", str(path), "--train.supervised-steps", "8", "--print-config"])
    train = json.loads(capsys.readouterr().out)["train"]
    assert (train["supervised_steps"], train["supervised_epochs"]) == (8, None)


def recipe(name: str) -> Config:
    return config.load_recipe(Config, RECIPES / f"{name}.toml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_values_are_the_published_ones(name, tmp_path):
    classes, lr, epochs, crop_px, long_side = PUBLISHED[name]
    found = recipe(name)
    assert (found.train.lr, found.train.epochs, found.augment.crop_px,
            found.augment.long_side) == (lr, epochs, crop_px, long_side)
    assert len(class_list(tmp_path, found.data.layout).names) == classes
    assert (found.train.batch_global, found.train.momentum, found.train.weight_decay) == (16, 0.9, 1e-4)
    assert (
        found.train.head_lr_multiplier is None
        and found.train.select == "best"
        and found.train.supervised_epochs is None
    )
    assert (found.model.name, found.model.backbone,
            found.model.output_stride) == ("deeplabv3plus", "resnet50", 8)
    assert (found.method, found.label.tta, found.label.min_confidence) == ("stpp", "stpp", 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_steps_match_the_run(name):
    text = (RECIPES / f"{name}.toml").read_text()
    rows = re.findall(r"^# +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)(?: +(1/\d+))?$", text, re.MULTILINE)
    assert len(rows) == {"pascal": 8, "cityscapes": 3}[name]
    train, total = recipe(name).train, TRAINING_IMAGES[name]

    def steps(entries: int) -> int:
        return StepSampler(entries, train.batch_global, seed=0, stage=1).steps_per_epoch * train.epochs

    for *numbers, fraction in rows:
        labels, unlabelled, *stages = map(int, numbers)
        assert labels + unlabelled == total
        assert not fraction or splits._count(fraction, total) == labels
        joint = [labels * math.ceil(count / labels) + count for count in (unlabelled // 2, unlabelled)]
        assert stages == [steps(labels * (2 if labels < 200 else 1)), *map(steps, joint)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_lists_published_results_and_marks_estimates(name):
    text = (RECIPES / f"{name}.toml").read_text()
    assert [figure for figure in MIOU[name] if figure not in text] == []
    assert "ESTIMATE" in text and "not yet reproduced" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_launch_line_and_its_variants_resolve(name, monkeypatch):
    text = (RECIPES / f"{name}.toml").read_text()
    line = re.search(r"-m stpp train (.*?)\n#\n", text, re.DOTALL)[1].replace("\\\n#", " ").split()
    path = line[line.index("--recipe") + 1]
    assert RECIPES / Path(path).name == RECIPES / f"{name}.toml"
    monkeypatch.chdir(RECIPES.parents[1])
    for more in ([], ["--model.backbone", "resnet101"], ["--method", "supervised"], ["--method", "st"],
                 ["--train.accumulate", "2"], ["--data.fraction", "1/4"]):
        resolved = train.parse([*line, *more]).config
        assert resolved.data.layout == {"pascal": "voc"}.get(name, name) and resolved.data.split is not None


def test_recipes_are_listed_with_their_subject(capsys):
    code, out, _ = ended(capsys, "recipes")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and lines.keys() == {path.stem for path in RECIPES.glob("*.toml")}
    assert lines["cityscapes"].startswith("Cityscapes (19 classes") and all(
        len(line) < 140 for line in out.splitlines()
    )


@pytest.mark.parametrize("spelled",
                         [["--recipe", "pascal"], ["--recipe=pascal"],
                          ["--train.epochs", "80", "--recipe", "pascal"]])
def test_recipe_is_found_by_name(spelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pascal").mkdir()  # a possible name of the data
    assert train.parse(spelled).config == recipe("pascal")
    (tmp_path / "pascal").rmdir()
    (tmp_path / "pascal").write_text("seed = 7")
    assert train.parse(spelled).config.seed == 7  # a file of this name has precedence


@pytest.mark.parametrize("name", ["nowhere", "pascal.toml", "../pascal", ""])
def test_unknown_recipe_is_refused_with_the_known_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, "train", "--recipe", name, "--print-config")
    assert f"--recipe {name}: no such file" in said
    assert f"one of {', '.join(sorted(path.stem for path in RECIPES.glob('*.toml')))}" in said


def test_without_a_checkout_a_path_is_required(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "absent")
    assert "no recipes in" in ended(capsys, "recipes")[1]
    assert refused(capsys, "train", "--recipe", "pascal").endswith("give the path of a .toml file")


# Classes of the network, its learning rate at the published batch, epochs, crop, images of each list a step,
# confidence, loss.
CONSISTENCY = {
    "pascal_unimatch": (0.001, 80, 321, 8, 0.95, "ce"),
    "cityscapes_unimatch": (0.005, 240, 801, 8, 0.0, "ohem"),
    "pascal_unimatch_v2": (5e-6, 60, 518, 16, 0.95, "ce"),
    "cityscapes_unimatch_v2": (5e-6, 180, 798, 8, 0.95, "ohem"),
    "ade20k_unimatch_v2": (5e-6, 60, 518, 8, 0.95, "ce"), "coco_unimatch_v2": (5e-6, 20, 518, 16, 0.95, "ce"),
}
CONSISTENCY_IMAGES = {"pascal": 10582, "cityscapes": 2975, "ade20k": 20210, "coco": 118287}


@pytest.mark.parametrize("name", CONSISTENCY)
def test_unimatch_values_are_the_published_ones(name):
    found, (lr, epochs, crop_px, batch, confidence, loss) = recipe(name), CONSISTENCY[name]
    train = found.train
    assert train.lr * train.batch_global / 16 == pytest.approx(lr) and train.batch_global == batch
    assert (train.epochs, found.augment.crop_px, found.consistency.confidence,
            train.loss) == (epochs, crop_px, confidence, loss)
    assert (found.augment.long_side, found.augment.long_side_unit) == ((50, 200), "percent")
    if name.endswith("v2"):
        assert (found.method, found.model.name, found.model.backbone) == ("unimatch-v2", "dpt", "dinov2-base")
        assert (train.optimizer, train.weight_decay, train.head_lr_multiplier,
                found.consistency.ema) == ("adamw", 0.01, 40, 0.996)
        assert crop_px % 14 == 0 and not found.model.freeze_backbone
    else:
        assert (found.method, found.model.backbone,
                found.model.output_stride) == ("unimatch", "resnet101-deep-stem", 16)
        assert (train.optimizer, train.weight_decay, train.momentum) == ("sgd", 1e-4, 0.9)
        assert train.head_lr_multiplier == (1 if "cityscapes" in name else None) and train.sync_bn
    window = {"cityscapes_unimatch": (801, "cut"), "cityscapes_unimatch_v2": (798, "shifted")}
    assert (train.validate_window, train.validate_window_edges) == window.get(name, (None, "cut"))


@pytest.mark.parametrize("name", [*CONSISTENCY, "camvid_unimatch"])
def test_unimatch_launch_lines_and_variants_resolve(name, monkeypatch):
    text = (RECIPES / f"{name}.toml").read_text()
    line = re.search(r"stpp train (.*?)\n#\n", text, re.DOTALL)[1].replace("\\\n#", " ").split()
    assert Path(line[line.index("--recipe") + 1]).stem == name
    monkeypatch.chdir(RECIPES.parents[1])
    variants = [[], ["--train.accumulate", "2"], ["--method", "fixmatch", "--consistency.ema", "0"]]
    if name.endswith("v2"):
        variants += [["--model.backbone", f"dinov2-{size}"] for size in ("small", "base", "large")]
        variants += [["--model.checkpoint-activations", "--model.freeze-backbone"]]
    elif name != "camvid_unimatch":
        variants += [["--model.backbone", "resnet50-deep-stem"]]
    for more in variants:
        resolved = train.parse([*line, *more]).config
        with torch.device("meta"):
            network = network_of(resolved.model, 21)
        assert resolved.augment.crop_px % network.crop_multiple == 0
        assert resolved.data.split is not None or name == "camvid_unimatch"


def test_camvid_unimatch_is_small_enough_for_two_cores():
    text, found = (RECIPES / "camvid_unimatch.toml").read_text(), recipe("camvid_unimatch")
    train, first = found.train, found.train.supervised_steps * found.train.batch_global
    crops = 4 * train.steps * train.batch_global
    assert f"{train.supervised_steps} steps, {first // 1000} {first % 1000:03} crops" in text
    assert re.search(f"{train.steps} steps of 8 .*: {crops // 1000} {crops % 1000:03} crops", text)
    assert f"control: {train.steps} steps" in text and train.from_teacher
    assert (found.method, found.model.pretrained) == ("unimatch-v2", "imagenet")
    published = AugmentConfig()
    assert found.augment.hue < published.hue and found.augment.jitter[0] > published.jitter[0]


def test_camvid_recipes_differ_only_in_method():
    own = {"method", "label.relabel", "train.steps"}  # a step of UniMatch-V2 sees four times as many crops
    stpp, unimatch = (config.flatten(config.to_dict(recipe(f"camvid_{method}")))
                      for method in ("stpp", "unimatch"))
    assert {key for key in stpp if stpp[key] != unimatch[key]} == own


def test_camvid_stpp_header_states_its_steps():
    text, train = (RECIPES / "camvid_stpp.toml").read_text(), recipe("camvid_stpp").train
    for stages, steps in (("stage 1", train.supervised_steps), ("stages 4 and 6", train.steps)):
        thousands, rest = divmod(steps * train.batch_global, 1000)
        assert f"{stages}: {steps} steps, {thousands} {rest:03} crops" in text
    assert f"control: {2 * train.steps} steps" in text and train.from_teacher
    assert recipe("camvid_stpp").label.relabel and "then of all 321" in text


@pytest.mark.parametrize("name", CONSISTENCY)
def test_unimatch_header_steps_match_the_run(name):
    text, train = (RECIPES / f"{name}.toml").read_text(), recipe(name).train
    rows = re.findall(r"^# +(\d+) +(\d+) +(\d+)(?: +(1/\d+))?$", text, re.MULTILINE)
    assert len(rows) >= 4
    total = CONSISTENCY_IMAGES[name.partition("_")[0]]
    for *numbers, _ in rows:
        labels, unlabelled, steps = map(int, numbers)
        assert labels + unlabelled == total
        streams = [Stream(samples=range(count), masked=False, number=i) for i,
                   count in enumerate((labels, unlabelled))]
        per_epoch = {sampler.steps_per_epoch
                     for sampler in stage_samplers(streams, train.batch_global, seed=0, stage=1)}
        assert {count * train.epochs for count in per_epoch} == {steps}
    assert "not yet reproduced" in text and "unmeasured" in text
