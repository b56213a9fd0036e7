"""Training step against a plain loop, over ranks and accumulation, and interrupted runs."""

import copy
import dataclasses
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import torchrun
from stpp import checkpoint, distributed, files
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from stpp.dataset import index
from stpp.errors import UserError
from stpp.inference import export
from stpp.loading import loader
from stpp.loading.sample import Stream
from stpp.loading.sampler import StepSampler
from stpp.methods.supervised import Supervised
from stpp.models.build import build_model, parameter_groups
from stpp.models.pretrained import start_from
from stpp.precision import autocast_dtype
from stpp.training.assemble import fresh_network, images_per_pass, stream_seed
from stpp.training.trainer import Schedule, Scores, Trainer

WORKER = str(Path(__file__).parents[1] / "workers" / "steps.py")
STEPS = 3


@pytest.fixture(scope="module")
def alone(synthetic, synthetic_index, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("alone") / "steps.pt"
    ran = subprocess.run([sys.executable, WORKER, synthetic, synthetic_index, out, "1", str(STEPS)],
                         capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    return torch.load(out)


def assert_same(first: dict, second: dict) -> None:
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-5)
    for key, value in second["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.dist
def test_two_ranks_take_the_same_steps_as_one(synthetic, synthetic_index, alone, tmp_path):
    ran = torchrun(2, WORKER, str(synthetic), str(synthetic_index), str(tmp_path / "steps.pt"), "1",
                   str(STEPS))
    assert ran.returncode == 0, ran.stderr
    assert_same(torch.load(tmp_path / "steps.pt"), alone)


@pytest.mark.dist
def test_accumulation_takes_the_same_steps(synthetic, synthetic_index, alone, tmp_path):
    ran = torchrun(2, WORKER, str(synthetic), str(synthetic_index), str(tmp_path / "steps.pt"), "2",
                   str(STEPS))
    assert ran.returncode == 0, ran.stderr
    assert_same(torch.load(tmp_path / "steps.pt"), alone)


def test_steps_equal_a_plain_loop(synthetic_index, alone):
    """The oracle: full-size logits, cross-entropy averaged over the counted pixels, SGD with a poly
    schedule."""
    sys.path.insert(0, str(Path(WORKER).parent))
    from steps import Plain, mixed_samples

    samples = mixed_samples(index.load(synthetic_index))
    torch.manual_seed(stream_seed(0, 1))
    network = Plain()
    lr, weights = 0.05 * 8 / 16, dict(network.named_parameters())
    momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
    draws = StepSampler(len(samples), 8, seed=0, stage=1).micro_batches(0, STEPS)
    augment = AugmentConfig(crop_px=64, long_side=(40, 160))
    batches = loader.pick().train_batches(Stream(samples=samples), draws, augment=augment, seed=0, stage=1,
                                          device=torch.device("cpu"), threads=1)
    losses = []
    for k, batch in enumerate(batches):
        assert batch.step == k
        assert len({(image == 255).sum().item() for image in batch.labels_NHW}) > 1
        full = F.interpolate(network(batch.images_NCHW), size=(64, 64), mode="bilinear", align_corners=True)
        loss = F.cross_entropy(full, batch.labels_NHW.long(), ignore_index=255)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        losses.append(loss.item())
        with torch.no_grad():
            for (name, value), gradient in zip(weights.items(), gradients, strict=True):
                step = gradient + 1e-4 * value
                momentum[name] = step if k == 0 else 0.9 * momentum[name] + step
                factor = 1.0 if name.startswith("backbone") else 10.0
                value -= lr * factor * (1 - k / STEPS) ** 0.9 * momentum[name]
    assert len(losses) == STEPS
    assert_same(alone, {"losses": losses,
                        "weights": {f"network.{name}": value for name,
                                    value in network.state_dict().items()}})


def tiny(**changes) -> Config:
    return Config(deterministic=True, data=DataConfig(loader="auto", threads=1),
                  model=ModelConfig(backbone="resnet18", output_stride=16),
                  augment=AugmentConfig(crop_px=33, long_side=(40, 80)),
                  train=TrainConfig(batch_global=4, lr=0.05, precision="fp32", **changes))


def scored(miou: float) -> Scores:
    return Scores(miou=miou, iou={"a": miou, "b": 10.0})


def trainer(config: Config, samples, folder: Path, validate, steps=6, period=2) -> Trainer:
    here = distributed.World(device=torch.device("cpu"))
    step = Supervised(fresh_network(config, here, tuple("abcdef"), stage=1), config)
    return Trainer(config, here, step, step.streams(config, samples), key=1, title="t",
                   classes=tuple("abcdef"), folder=folder,
                   schedule=Schedule(steps=steps, validate_steps=period, keep_steps=(2, 4, 6)),
                   validate=validate and (lambda network: scored(validate(network))))


def weights_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)["model"]


def test_interrupted_run_resumes_to_the_same_weights(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    scores = iter([30.0, 20.0, 25.0])
    whole = trainer(tiny(), samples, tmp_path / "whole", lambda _: next(scores)).run()
    assert (whole.miou, whole.step, whole.steps) == (30.0, 2, 6)

    def fails(_: nn.Module) -> float:
        if (tmp_path / "broken" / "last.pt").exists():
            raise RuntimeError("power cut")
        return 30.0

    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tiny(), samples, tmp_path / "broken", fails).run()
    scores = iter([20.0, 25.0])
    resumed = trainer(tiny(), samples, tmp_path / "broken", lambda _: next(scores)).run()
    assert (resumed.miou, resumed.step) == (30.0, 2)
    assert resumed.iou == {"a": 30.0, "b": 10.0}  # of an earlier step: scores.json is made of it
    for name in ("last.pt", "best.pt", "third-1.pt", "third-2.pt", "third-3.pt"):
        ours, theirs = weights_of(tmp_path / "broken" / name), weights_of(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    rows = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [row for row in rows if '"loss"' in row] and len({row for row in rows}) == len(rows)


def test_resume_between_best_and_checkpoint_rewrites_same_files(synthetic_index, tmp_path, monkeypatch):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    scores = iter([30.0, 40.0, 25.0])
    trainer(tiny(), samples, tmp_path / "whole", lambda _: next(scores)).run()

    scores, broken = iter([30.0, 40.0]), trainer(tiny(), samples, tmp_path / "broken", lambda _: next(scores))
    save = broken._save

    def once() -> None:
        if broken.steps_done > 2:
            broken.writer.wait()  # best.pt of step 4 exists
            raise RuntimeError("power cut")
        save()

    monkeypatch.setattr(broken, "_save", once)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.run()
    scores = iter([40.0, 25.0])
    resumed = trainer(tiny(), samples, tmp_path / "broken", lambda _: next(scores))
    result = resumed.run()
    assert (result.miou, result.step, result.iou) == (40.0, 4, {"a": 40.0, "b": 10.0})
    for name in ("best.pt", "third-1.pt", "third-2.pt", "third-3.pt"):
        ours, theirs = (checkpoint.load(tmp_path / run / name) for run in ("broken", "whole"))
        assert {key: value for key, value in ours.items() if key != "model"} == {
            key: value for key, value in theirs.items() if key != "model"}, name
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"]), name


def spoil(network: nn.Module, calls: set[int]) -> None:
    """Makes the output of a network non-finite in some of its calls."""
    forward, count = network.forward, itertools.count()
    network.forward = lambda images_NCHW: (
        forward(images_NCHW) * (float("nan") if next(count) in calls else 1.0)
    )


def spoiled(policy: str, synthetic_index, folder: Path, calls: set[int]) -> Trainer:
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(tiny(on_nonfinite=policy), samples, folder, None)
    spoil(ours.step.network, calls)
    return ours


def test_overflow_inside_the_network_leaves_the_statistics(synthetic_index, tmp_path):
    """As in fp16: maps become infinite before a batch norm, whose running averages would never recover."""
    ours = spoiled("skip", synthetic_index, tmp_path, set())
    layer = ours.step.network.backbone.layer1[0].conv1
    layer.register_forward_hook(lambda *_: _[2] * math.inf if ours.steps_done == 1 else None)
    for passes, _ in ours._passes():
        before = {name: value.clone() for name, value in ours.step.network.named_buffers()}
        _, nonfinite = ours.train_step(passes)
        after = dict(ours.step.network.named_buffers())
        running = [name for name in after if "running" in name]
        assert all(after[name].isfinite().all() for name in running)
        assert bool(nonfinite) == all(torch.equal(before[name], after[name]) for name in running)
        assert bool(nonfinite) == (ours.steps_done == 2)


@pytest.mark.parametrize("calls", [{0}, {2, 3}])
def test_non_finite_step_is_skipped(synthetic_index, tmp_path, calls):
    ours = spoiled("skip", synthetic_index, tmp_path, calls)
    for number, (passes, _) in enumerate(ours._passes()):
        weights = {name: value.detach().clone() for name, value in ours.step.network.named_parameters()}
        _, nonfinite = ours.train_step(passes)
        same = all(torch.equal(weights[name], value) for name, value in ours.step.network.named_parameters())
        assert (bool(nonfinite), same) == (number in calls, number in calls)
        assert all(value.isfinite().all() for value in ours.step.network.parameters())
    assert all(state["momentum_buffer"].isfinite().all() for state in ours.optimizer.state.values())


def test_non_finite_step_names_its_images(synthetic_index, tmp_path):
    ours = spoiled("skip", synthetic_index, tmp_path / "skip", {3})
    ours.run()
    (row,) = [json.loads(line) for line in (tmp_path / "skip" / "nonfinite.jsonl").read_text().splitlines()]
    drawn = next(ours.samplers[0].micro_batches(3, 4))
    assert row == {"step": 3, "keys": [ours.streams[0].samples[i].key for i in drawn.indices]}
    stopped = spoiled("stop", synthetic_index, tmp_path / "stop", {3})
    with pytest.raises(UserError, match=r"not finite at step 3 .*nonfinite.jsonl.*--train.on-nonfinite skip"):
        stopped.run()
    assert checkpoint.load(tmp_path / "stop" / "last.pt")["step"] == 2  # the previous one
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "stop" / "last.pt").values())


def test_sigterm_saves_before_ending(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(tiny(), samples, tmp_path, None, period=6)
    count = itertools.count()
    ours.step.network.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGTERM)
                                                if next(count) == 3 else None)
    with pytest.raises(SystemExit) as ended:
        ours.run()
    assert ended.value.code == 143
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4


@pytest.mark.parametrize("number", [1, 2])
def test_sigterm_in_a_validation_ends_the_run(synthetic_index, tmp_path, number):
    """Also in the last one, after which no step follows."""
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    count = itertools.count(1)

    def validate(network: nn.Module) -> float:
        if next(count) == number:
            signal.raise_signal(signal.SIGTERM)
        return 50.0

    ours = trainer(tiny(), samples, tmp_path, validate, steps=4, period=2)
    with pytest.raises(SystemExit) as ended:
        ours.run()
    assert ended.value.code == 143
    assert checkpoint.load(tmp_path / "last.pt")["step"] == (3 if number == 1 else 4)


@pytest.mark.parametrize(("first", "then"), [("bf16", "fp32"), ("fp32", "fp16"), ("fp16", "bf16")])
def test_run_resumes_in_another_precision(synthetic_index, tmp_path, monkeypatch, capsys, first, then):
    """As `--train.precision auto` chooses on another device; fp16 has a scaler, whose state others lack."""
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, steps in ((first, 2), (then, 4)):
        monkeypatch.setattr("stpp.training.trainer.autocast_dtype", lambda *_, name=name: dtypes[name])
        ours = trainer(tiny(), samples, tmp_path, None, steps=steps)
        ours.schedule = dataclasses.replace(ours.schedule, keep_steps=())
        if steps == 2:
            ours.run()
        else:
            ours._resume()
    assert ours.steps_done == 2
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    assert f"resuming in {names[then]}, after steps in {names[first]}" in capsys.readouterr().err


def test_time_for_a_checkpoint_is_that_of_rank_0(synthetic_index, tmp_path, monkeypatch):
    """Clocks differ, and ranks that save at different steps would no longer meet."""
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(tiny(checkpoint_minutes=1e-9), samples, tmp_path, None, steps=24, period=24)
    monkeypatch.setattr(distributed.World, "is_main", False)
    saved, kept = [], ours._save
    ours._save = lambda: (saved.append(ours.steps_done), kept())
    ours.run()
    assert saved == [24]


def test_checkpoints_by_steps_and_by_minutes(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    saved = []

    def run(folder: str, **changes) -> list[int]:
        saved.clear()
        ours = trainer(tiny(**changes), samples, tmp_path / folder, None, steps=24, period=24)
        ours.schedule = dataclasses.replace(ours.schedule, keep_steps=())
        kept, ours._save = ours._save, lambda: (saved.append(ours.steps_done), kept())
        ours.run()
        return list(saved)

    assert run("steps", checkpoint_steps=7) == [7, 14, 21, 24]
    assert run("minutes", checkpoint_minutes=1e-9) == [10, 20, 24]
    assert run("neither") == [24]


def test_checkpoint_without_disk_space_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, step=1)

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        checkpoint.save(path, step=2)  # there is room: another cause
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with checkpoint.CheckpointWriter() as writer:
        writer.save(path, step=2, weights=torch.zeros(2**20))
        with pytest.raises(
            UserError, match=r"last.pt needs 4 MiB and the disk has 1 left; earlier checkpoints are intact"
        ):
            writer.wait()
    assert checkpoint.load(path)["step"] == 1


def test_checkpoint_holds_the_state_at_its_request(tmp_path):
    weights = torch.zeros(3)
    with checkpoint.CheckpointWriter() as writer:
        writer.save(tmp_path / "a.pt", weights=weights, more={"list": [weights]})
        weights += 1
        writer.save(tmp_path / "b.pt", weights=weights)
    first = checkpoint.load(tmp_path / "a.pt")
    assert not first["weights"].any() and not first["more"]["list"][0].any()
    assert checkpoint.load(tmp_path / "b.pt")["weights"].all()


def test_thirds_on_the_same_step_are_all_kept(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(tiny(), samples, tmp_path, None, steps=2)
    ours.schedule = dataclasses.replace(ours.schedule, keep_steps=(1, 1, 2))
    ours.run()
    first, second, last = (weights_of(tmp_path / f"third-{i}.pt")["classifier.weight"] for i in (1, 2, 3))
    assert torch.equal(first, second) and not torch.equal(second, last)


def test_only_a_strictly_better_epoch_becomes_the_teacher(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    scores = iter([10.0, 20.0, 20.0])
    assert trainer(tiny(), samples, tmp_path / "best", lambda _: next(scores)).run().step == 4
    scores = iter([10.0, 20.0, 15.0])
    last = trainer(tiny(select="last"), samples, tmp_path / "last", lambda _: next(scores)).run()
    assert (last.step, last.miou) == (6, 15.0)
    unknown = trainer(tiny(), samples, tmp_path / "unknown", None).run()
    assert (unknown.step, unknown.miou) == (6, None)
    assert (tmp_path / "unknown" / "best.pt").exists()


def test_all_ignored_pixels_give_no_nan(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(tiny(), samples, tmp_path, None)
    passes, _ = next(ours._passes())
    blank = [(dataclasses.replace(batch, labels_NHW=torch.full_like(batch.labels_NHW, 255)),) for batch,
             in passes]
    assert ours.train_step(blank)[0].item() == 0
    assert all(torch.isfinite(value).all() for value in ours.step.network.state_dict().values())


FOLLOWS = {"fp32": 0.01, "bf16": 0.03}
"""Tolerance of a loss to that of the recipe, relative to the first loss; measured: 0.003 and 0.007. Rounding
grows with steps and rate: batch norm sees as few as eight numbers here."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_match_the_recipe_in_float32(synthetic_index, tmp_path, precision):
    """The oracle: plain convolutions in NCHW, full-size logits, PyTorch's own SGD, the schedule as
    written."""
    steps, known = 20, index.load(synthetic_index)
    config = Config(model=ModelConfig(backbone="resnet18", output_stride=16),
                    augment=AugmentConfig(crop_px=65, long_side=(48, 96)),
                    train=TrainConfig(batch_global=8, lr=0.0005, precision=precision))
    found = trainer(config, [known.sample(image) for image in sorted(known.entries)], tmp_path, None,
                    steps=steps)
    for module in found.step.network.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0  # their draws differ between layouts
    network = export.plain_copy(copy.deepcopy(found.step.network)).to(memory_format=torch.contiguous_format)
    backbone, head = parameter_groups(network)
    lr = 0.0005 * 8 / 16
    optimizer = torch.optim.SGD([{"params": backbone, "base": lr}, {"params": head, "base": 10 * lr}], lr=lr,
                                momentum=0.9, weight_decay=1e-4)
    ours, theirs = [], []
    for step, (passes, _) in enumerate(found._passes()):
        ((batch,),) = passes
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * (1 - step / steps) ** 0.9
        size = batch.labels_NHW.shape[1:]
        full = F.interpolate(network(batch.images_NCHW.contiguous()), size, mode="bilinear",
                             align_corners=True)
        loss = F.cross_entropy(full, batch.labels_NHW.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
        ours.append(found.train_step(passes)[0].item())
    assert len(ours) == steps and theirs[-1] < 0.8 * theirs[0]
    assert max(abs(a - b) for a,
               b in zip(ours, theirs, strict=True)) <= FOLLOWS[precision] * theirs[0], (ours, theirs)


def looked_into(network: nn.Module, seen: list[tuple[str, bool]]) -> None:
    """Makes a network record whether cuDNN searches, in the forward and in the backward pass."""
    forward = network.forward

    def looking(images_NCHW):
        logits_NChw = forward(images_NCHW)
        seen.append(("forward", torch.backends.cudnn.benchmark))
        logits_NChw.register_hook(lambda _: seen.append(("backward", torch.backends.cudnn.benchmark)))
        return logits_NChw

    network.forward = looking


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_cudnn_searches_in_steps_only_unless_deterministic(synthetic_index, tmp_path, deterministic,
                                                           accumulate):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    seen: list[tuple[str, bool]] = []

    def validate(_: nn.Module) -> float:
        seen.append(("validate", torch.backends.cudnn.benchmark))
        return 30.0

    config = dataclasses.replace(tiny(accumulate=accumulate), deterministic=deterministic)
    ours = trainer(config, samples, tmp_path, validate, steps=4, period=2)
    looked_into(ours.step.network, seen)
    ours.run()
    step = [("forward", not deterministic), ("backward", not deterministic)] * accumulate
    assert seen == [*step, *step, ("validate", False)] * 2
    assert not torch.backends.cudnn.benchmark


def test_failed_step_restores_cudnn_settings(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    ours = trainer(dataclasses.replace(tiny(), deterministic=False), samples, tmp_path, None)

    def fail(*_) -> None:
        assert torch.backends.cudnn.benchmark
        raise RuntimeError("power cut")

    ours.step.network.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="power cut"):
        ours.run()
    assert not torch.backends.cudnn.benchmark


def test_loss_falls(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)][:4]
    ours = trainer(tiny(), samples, tmp_path, None, steps=30, period=30)
    losses = [ours.train_step(passes)[0].item() for passes, _ in ours._passes()]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


TRAINED = [(name, backbone, output_stride) for name in ("deeplabv3plus", "pspnet", "deeplabv2")
           for backbone in ("resnet18", "resnet50") for output_stride in (8, 16)]
TRAINED += [("deeplabv3plus", "resnet50-deep-stem", None), ("deeplabv3plus", "efficientnet-lite0", None),
            ("dpt", "dinov2-small", None)]


@pytest.mark.parametrize(("name", "backbone", "output_stride"), TRAINED)
def test_every_network_trains_a_step(synthetic_index, tmp_path, name, backbone, output_stride):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    model = ModelConfig(name=name, backbone=backbone, output_stride=output_stride)
    crops = AugmentConfig(crop_px=42 if name == "dpt" else 33, long_side=(40, 80))
    config = dataclasses.replace(tiny(), augment=crops, model=model)
    ours = trainer(config, samples, tmp_path, None)
    named = dict(ours.step.network.named_parameters())
    before = {key: value.detach().clone() for key, value in named.items() if value.requires_grad}
    assert len(before) == sum(map(len, parameter_groups(ours.step.network)))
    fixed = named.keys() - before.keys()
    assert all("mask_token" in key or "refinenet4.resConfUnit1" in key for key in fixed)
    assert bool(fixed) == (name == "dpt")
    loss, nonfinite = ours.train_step(next(ours._passes())[0])
    assert loss.isfinite() and loss > 0 and not nonfinite
    for key, value in ours.step.network.named_parameters():
        assert value.isfinite().all() and (key in fixed or not torch.equal(value, before[key])), key


def test_frozen_backbone_keeps_weights_and_statistics(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    path = tmp_path / "backbone.pth"
    torch.save(build_model("deeplabv3plus", "resnet18", 6, 16).backbone.state_dict(), path)
    model = ModelConfig(backbone="resnet18", output_stride=16, freeze_backbone=True, pretrained=str(path))
    config = dataclasses.replace(tiny(), model=model)
    ours = trainer(config, samples, tmp_path, lambda network: 1.0, steps=2, period=1)
    trained = parameter_groups(ours.step.network)[1]
    assert [len(group["params"]) for group in ours.optimizer.param_groups] == [0, len(trained)]
    before = {key: value.clone() for key, value in ours.step.network.state_dict().items()}
    ours.run()  # a validation between the steps puts the network into evaluation mode and back
    for key, value in ours.step.network.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key
    assert torch.load(tmp_path / "best.pt", weights_only=True)["architecture"] == {
        "name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16}
    for name in ("best.pt", "last.pt"):
        assert torch.load(tmp_path / name, weights_only=True)["pretrained"] == {
            "source": "backbone.pth", "sha256": files.sha256(path), "licence": None}
    with pytest.raises(ValueError, match="--model.freeze-backbone"):
        ModelConfig(freeze_backbone=True)


def test_checkpoint_of_other_classes_is_refused_as_a_start(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    trainer(tiny(), samples, tmp_path, None, steps=1).run()
    network = build_model("deeplabv3plus", "resnet18", 6, 16)
    begun = ModelConfig(backbone="resnet18", pretrained=str(tmp_path / "best.pt"))
    start_from(network, begun, list("abcdef"))
    assert torch.equal(network.state_dict()["classifier.weight"],
                       weights_of(tmp_path / "best.pt")["classifier.weight"])
    with pytest.raises(UserError, match="best.pt has 6 classes"):
        start_from(network, begun, list("abcdeg"))


@pytest.mark.parametrize(("batch", "ranks", "accumulate"), [(8, 8, 1), (8, 3, 1), (8, 2, 4), (6, 2, 2)])
def test_batches_that_do_not_divide_or_leave_one_image_are_refused(batch, ranks, accumulate):
    here = distributed.World(size=ranks, device=torch.device("cpu"))
    with pytest.raises(UserError, match="--train.batch-global"):
        images_per_pass(TrainConfig(batch_global=batch, accumulate=accumulate), here)
    assert images_per_pass(TrainConfig(batch_global=2 * ranks * accumulate, accumulate=accumulate), here) == 2


def test_unsupported_precision_is_refused():
    with pytest.raises(UserError, match="--train.precision fp16"):
        autocast_dtype("fp16", torch.device("cpu"))
    assert autocast_dtype("fp32", torch.device("cpu")) == torch.float32


def test_synchronised_batch_norm_is_skipped_on_a_cpu_with_a_message(capsys):
    network = fresh_network(tiny(sync_bn=True), distributed.World(device=torch.device("cpu")),
                            tuple("abcdef"), stage=1)
    assert "--train.sync-bn: PyTorch has no synchronised batch norm on a CPU" in capsys.readouterr().err
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
