"""Bottleneck of a run's steps, and the trace of a few of them."""

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stpp import config, distributed
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from stpp.dataset import index
from stpp.inference import fold
from stpp.methods.supervised import Supervised
from stpp.training import profiling
from stpp.training.assemble import fresh_network
from stpp.training.profiling import BottleneckMeter
from stpp.training.trainer import Schedule, Scores, Trainer

CPU = torch.device("cpu")
STEPS = profiling.WARM_UP + profiling.TRACED + 1


def ran(synthetic_index, folder: Path, *, profile: bool, steps: int = STEPS, validate=None) -> dict:
    """Returns the weights after a short run on four images: `steps` epochs of one step."""
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)][:4]
    settings = Config(deterministic=True, profile=profile, data=DataConfig(loader="reference", threads=1),
                      model=ModelConfig(backbone="resnet18", output_stride=16),
                      augment=AugmentConfig(crop_px=33, long_side=(40, 80)),
                      train=TrainConfig(batch_global=4, lr=0.05, precision="fp32"))
    here, classes = distributed.World(device=torch.device("cpu")), tuple("abcdef")
    step = Supervised(fresh_network(settings, here, classes, stage=1), settings)
    schedule = Schedule(steps=steps, validate_steps=profiling.WARM_UP + 1)
    Trainer(settings, here, step, step.streams(settings, samples), key=1, title="t", classes=classes,
            folder=folder, validate=validate, schedule=schedule).run()
    return step.network.state_dict()


def test_profile_writes_trace_and_table_and_changes_nothing(synthetic_index, tmp_path, capsys):
    plain, profiled = (ran(synthetic_index, tmp_path / str(profile), profile=profile)
                       for profile in (False, True))
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    folder = tmp_path / "True" / "profile"
    assert f"profile of {profiling.TRACED} steps in {folder}" in capsys.readouterr().err
    assert not (tmp_path / "False" / "profile").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["parts.txt", "trace-rank0.json.gz"]
    events = json.loads(gzip.decompress((folder / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    forward = [event for event in events if event.get("name") == profiling.FORWARD and event.get("ph") == "X"]
    assert len(forward) == profiling.TRACED
    text = (folder / "parts.txt").read_text()
    total = float(re.search(r"([0-9.]+) ms each", text)[1])
    parts = {name: float(ms) for name, ms in re.findall(r"^([a-z ]+?) +(-?[0-9.]+) +-?[0-9]+ %$", text, re.M)}
    assert set(parts) == {"data wait", *profiling.PARTS, "rest"}
    assert sum(parts.values()) == pytest.approx(total, abs=0.1)
    assert parts["forward"] == pytest.approx(sum(event["dur"] for event in forward) / 1000 / profiling.TRACED,
                                             rel=0.05, abs=0.02)
    assert min(parts["loss"], parts["optimizer"]) > 0 and parts["backward"] > parts["loss"]
    assert -0.01 * total < parts["rest"] < 0.5 * total
    assert "convolution" in text


def test_validation_within_the_traced_steps_is_not_part_of_them(synthetic_index, tmp_path):
    validations = []

    def validate(network) -> Scores:
        validations.append(fold.ready(network, device=CPU, dtype=torch.float32)(torch.zeros(1, 3, 33, 33)))
        return Scores(miou=1.0)

    ran(synthetic_index, tmp_path, profile=True, validate=validate)
    assert len(validations) == 2
    trace = gzip.decompress((tmp_path / "profile" / "trace-rank0.json.gz").read_bytes())
    events = [event for event in json.loads(trace)["traceEvents"] if event.get("name") == profiling.FORWARD]
    assert len([event for event in events if event.get("ph") == "X"]) == profiling.TRACED


def test_stage_too_short_for_a_profile_is_reported(synthetic_index, tmp_path, capsys):
    ran(synthetic_index, tmp_path, profile=True, steps=profiling.WARM_UP + 2)
    assert "too few steps were left for a profile" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_run_may_resume_with_a_profile():
    assert config.differing_keys(config.to_dict(Config()),
                                 config.to_dict(dataclasses.replace(Config(), profile=True))) == []


@pytest.mark.parametrize("wait_pct, exchange, kind",
                         [(1, 0.02, "compute"), (30, 0.02, "data"), (30, 0.5, "communication"),
                                                      (4, 0.09, "compute"), (12, 0.11, "data")])
def test_bottleneck_is_the_longest_wait(monkeypatch, capsys, wait_pct, exchange, kind):
    monkeypatch.setattr(profiling, "communication_share", lambda model: exchange)
    ours = BottleneckMeter("1-supervised", nn.Identity(), CPU)
    ours.add(profiling.LEAST_STEPS, 0.9 * profiling.LEAST_S, wait_pct)
    ours.end_epoch()
    assert capsys.readouterr().err == ""
    ours.add(1, 0.9 * profiling.LEAST_S, wait_pct)
    ours.end_epoch()
    said = capsys.readouterr().err
    assert (
        f"1-supervised: bound by {kind}: {wait_pct} % of a step waits for data, {100 * exchange:.0f} %"
        in said
    )
    assert profiling.ADVICE[kind] in said
    ours.add(profiling.LEAST_STEPS, 2 * profiling.LEAST_S, wait_pct)
    ours.end_epoch()
    assert capsys.readouterr().err == ""  # nothing new
    ours.add(profiling.LEAST_STEPS, 2 * profiling.LEAST_S, 90)
    ours.end_epoch()
    assert ("bound by data: 90 %" in capsys.readouterr().err) == (kind != "data")


def test_few_steps_give_no_advice(capsys):
    """Five labelled photographs make five steps an epoch, and the first of them is always slow."""
    ours = BottleneckMeter("1-supervised", nn.Identity(), CPU)
    for _ in range((profiling.LEAST_STEPS - 1) // 5):
        ours.add(5, 2 * profiling.LEAST_S, 90)
        ours.end_epoch()
    assert capsys.readouterr().err == ""
    ours.add(5, profiling.LEAST_S, 90)
    ours.end_epoch()
    said = capsys.readouterr().err
    assert "bound by data: 90 % of a step waits for data; to make it shorter" in said


@pytest.mark.parametrize("slow, device, logged",
                         [(2.5, "cpu", True), (1.5, "cpu", False), (2.5, "cuda", False)])
def test_scattered_steps_on_a_cpu_are_logged_once_with_the_load(monkeypatch, capsys, slow, device, logged):
    monkeypatch.setattr(profiling.OtherLoad, "cores", lambda self: 1.25)
    meter = BottleneckMeter("1-supervised", nn.Identity(), torch.device(device))
    for _ in range(2):
        for i in range(20):
            meter.add(5, 5 * (slow if i % 4 == 0 else 1), 0)
        meter.end_epoch()
    text = "steps take 1000 to 2500 ms; other processes use 1.2 of the cores"
    assert capsys.readouterr().err.count(text) == logged


def test_the_exchange_of_gradients_is_what_lies_outside_the_backward_pass(monkeypatch):
    assert profiling.communication_share(nn.Identity()) == 0
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    times = {"avg_forward_compute_time": 20, "avg_backward_compute_time": 30, "avg_backward_comm_time": 70,
             "avg_backward_compute_comm_overlap_time": 20}
    monkeypatch.setattr(DistributedDataParallel, "_get_ddp_logging_data", lambda self: times)
    assert profiling.communication_share(model) == 0.5
    times.clear()
    assert profiling.communication_share(model) == 0
