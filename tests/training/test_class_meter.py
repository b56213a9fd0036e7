"""Counts by class while a method labels images itself: against counting by hand, across a resume, and in
messages."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from stpp import distributed
from stpp.config import AugmentConfig, Config, ConsistencyConfig, DataConfig, ModelConfig, TrainConfig
from stpp.dataset import index
from stpp.methods.unimatch import UniMatch
from stpp.methods.unimatch_v2 import UniMatchV2
from stpp.training import class_shares
from stpp.training.assemble import fresh_network
from stpp.training.class_meter import ClassCounter, ClassMeter
from stpp.training.trainer import Schedule, Scores, Trainer

CLASSES = ("background", "disc", "box", "triangle", "star", "ring")
LABELLED = [600, 100, 100, 100, 99, 1]
HERE = distributed.World(device=torch.device("cpu"))
EPOCH, STEPS = 4, 8


def test_counter_equals_a_histogram():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (3, 2, 40, 30), generator=generator).byte()
    labels[labels == 6] = 255
    counter = ClassCounter()
    counter.add(labels[0])
    assert counter.take() is None  # nobody asked
    counter.enable(6)
    for one in labels:
        counter.add(one)
    counts = torch.bincount(labels.flatten().long(), minlength=256)[:6].tolist()
    assert counter.take() == counts and sum(counts) < labels.numel()
    assert counter.take() is None


def trainer(kind, known: index.Index, folder: Path, told: list, validate=None) -> Trainer:
    """Two epochs of a UniMatch on 12 labelled and 16 unlabelled images."""
    config = Config(method="unimatch-v2", deterministic=True, data=DataConfig(threads=1),
                    model=ModelConfig(backbone="resnet18", output_stride=16),
                    augment=AugmentConfig(crop_px=33, long_side=(40, 80)),
                    consistency=ConsistencyConfig(confidence=0.1),
                    train=TrainConfig(batch_global=4, lr=0.05, precision="fp32"))
    samples = [known.sample(image) for image in sorted(known.entries)]
    step = kind(fresh_network(config, HERE, CLASSES, stage=1), config)
    bare = [dataclasses.replace(sample, mask=None) for sample in samples[12:28]]
    meter = ClassMeter("t", step.confident, classes=CLASSES, labelled=LABELLED, warn=told.append)
    return Trainer(config, HERE, step, step.streams(config, samples[:12], bare), key=1, title="t",
                   classes=CLASSES, folder=folder, schedule=Schedule(steps=STEPS, validate_steps=3),
                   validate=validate, meter=meter)


def rows_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "confident_pct" in row]


def spied(trainer_: Trainer) -> list[torch.Tensor]:
    """Records the label maps that the step counts."""
    seen, add = [], trainer_.step.confident.add
    trainer_.step.confident.add = lambda labels_NHW: (seen.append(labels_NHW.clone()), add(labels_NHW))[1]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", [UniMatch, UniMatchV2])
def test_shares_of_an_epoch_match_its_labels(kind, synthetic_index, tmp_path):
    ours = trainer(kind, index.load(synthetic_index), tmp_path, told := [])
    seen = spied(ours)
    ours.run()
    assert len(seen) == STEPS
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [EPOCH, STEPS]
    for number, row in enumerate(rows):
        labels = torch.cat([one.flatten() for one in seen[EPOCH * number : EPOCH * (number + 1)]]).long()
        counts = torch.bincount(labels, minlength=256)[:6].double()
        shares = 100 * counts / counts.sum()
        assert list(row["confident_pct"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert list(row["labelled_pct"].values()) == pytest.approx([60, 10, 10, 10, 9.9, 0.1])
        ratios = (shares / torch.tensor([60, 10, 10, 10, 9.9, 0.1])).tolist()
        assert list(row["confident_ratio"].values()) == pytest.approx(ratios, abs=1e-4)
    lost = {name for name, ratio in rows[-1]["confident_ratio"].items() if ratio < class_shares.ABSENT}
    assert lost and told[-1].keys() == lost


@pytest.mark.slow
def test_counts_of_an_epoch_survive_an_interruption(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    trainer(UniMatchV2, known, tmp_path / "whole", [], lambda _: Scores(miou=1.0)).run()

    def fails(_) -> Scores:
        if (tmp_path / "broken" / "last.pt").exists():
            raise RuntimeError("power cut")
        return Scores(miou=1.0)

    with pytest.raises(RuntimeError, match="power cut"):
        trainer(UniMatchV2, known, tmp_path / "broken", [], fails).run()
    saved = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert saved["step"] == 3 and sum(saved["by_class"]) > 0
    trainer(UniMatchV2, known, tmp_path / "broken", [], lambda _: Scores(miou=1.0)).run()
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")


def test_pseudo_labels_are_logged_only_at_the_first_step(tmp_path):
    from stpp import log

    meter = ClassMeter("t", ClassCounter(), classes=("a", "b"), labelled=[3, 1], pseudo=[9, 1])
    for step in (0, 5):
        with log.Metrics(tmp_path, first_step=step) as metrics:
            meter.begin(metrics, step)
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row == {"step": 0, "labelled_pct": {"a": 75.0, "b": 25.0}, "pseudo_pct": {"a": 90.0, "b": 10.0},
                   "pseudo_ratio": {"a": 1.2, "b": 0.4}}


def test_restarted_stage_writes_its_first_row_once(tmp_path):
    from stpp import log

    meter = ClassMeter("t", ClassCounter(), classes=("a", "b"), labelled=[3, 1], pseudo=[9, 0])
    for _ in range(2):
        with log.Metrics(tmp_path, first_step=0) as metrics:
            meter.begin(metrics, 0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_missing_classes_are_those_below_a_tenth():
    found = class_shares.missing(("a", "b", "c", "d"), [800, 100, 100, 0], [900, 9, 11, 0], "pixels")
    assert found.keys() == {"b"}
    assert found["b"] == ("class b has 10 % of the labelled pixels and 0.978 % of the pixels, 0.098 times as "
                          "much")
    found = class_shares.missing(("a", "b", "c"), [1, 1, 0], [0, 0, 0], "confident pixels of this epoch")
    assert found == dict.fromkeys("ab", "there are no confident pixels of this epoch, of any class")
