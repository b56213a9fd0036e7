"""Runs with the remedies for rare classes: thresholds from held-out labels, reported shares, exact resume."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cli_cases import ended, refused
from run_cases import TINY
from stpp import distributed
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, RareConfig, TrainConfig
from stpp.dataset import index
from stpp.images.masks import read_index_mask
from stpp.inference import calibration
from stpp.label import rows
from stpp.loading import rare_images
from stpp.methods.supervised import Supervised
from stpp.training import class_rules
from stpp.training.assemble import fresh_network
from stpp.training.trainer import Schedule, Scores, Trainer

CLASSES = ("background", "disc", "box", "triangle", "star", "ring")
AUTO = ["--method", "st", "--label.min-confidence", "auto", "--label.precision", "0.3", "--advise.share",
        "0.3", "--rare.sampling", "0.5", "--rare.weights", "inverse-sqrt", "--train.loss", "ohem-image"]


@pytest.fixture(scope="module")
def begun(synthetic, synthetic_index, tmp_path_factory) -> list[str]:
    """Returns a run's command without its folder."""
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    recipe.write_text(TINY)
    return [sys.executable, "-m", "stpp", "train", "--recipe", str(recipe), "--data.root", str(synthetic),
            "--data.index", str(synthetic_index), *AUTO]


@pytest.fixture(scope="module")
def run(begun, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "auto"
    done = subprocess.run([*begun, "--out", str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (out / "said.txt").write_text(done.stderr)
    return out


@pytest.mark.slow
def test_labels_use_the_least_confidence_of_held_out_labels(run):
    held = (run / "held-out.txt").read_text().splitlines()
    labelled = (run / "split" / "labeled.txt").read_text().splitlines()
    assert len(held) == 3 and set(held) < set(labelled)
    found = calibration.read(run / "stages" / "1-supervised" / "calibration.json")
    assert (found.images, found.tta, found.classes) == (3, "flip", CLASSES)
    job = json.loads((run / "stages" / "2-label" / "run.json").read_text())["fingerprint"]
    assert job["floors"] == list(found.floors(0.3)) and job["teacher"].startswith(f"{found.network}-")
    never = {i for i, floor in enumerate(job["floors"]) if floor == calibration.NEVER}
    for row in rows.read_parts(run / "stages" / "2-label", "labels"):
        mask = read_index_mask(run / "stages" / "2-label" / "masks" / f"{row['key']}.png")
        assert not never & set(np.unique(mask).tolist())
    said = (run / "said.txt").read_text()
    assert "calibrating 1-supervised on 3 held-out images, flip views" in said
    assert "confidence thresholds for a precision of 0.3: " in said


@pytest.mark.slow
def test_shares_of_the_pseudo_labels_are_logged(run):
    first = json.loads((run / "stages" / "3-retrain" / "metrics.jsonl").read_text().splitlines()[0])
    summary = json.loads((run / "stages" / "2-label" / "summary.json").read_text())
    counts = np.array(summary["class_pixels"])
    assert first["step"] == 0 and list(first["pseudo_pct"]) == list(CLASSES)
    shares = (100 * counts / counts.sum()).tolist()
    assert list(first["pseudo_pct"].values()) == pytest.approx(shares, abs=1e-5)
    page = (run / "report" / "index.html").read_text()
    assert "Classes of <bdi>3-retrain</bdi>: labelled and pseudo-labelled pixels, %" in page
    assert 'aria-label="Coverage against precision of 1-supervised"' in page


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_labels_and_weights(begun, run, tmp_path):
    out = tmp_path / "killed"
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen([*begun, "--out", str(out)], stderr=said, start_new_session=True)
    end = time.monotonic() + 200
    while not list((out / "stages").glob("2-label/run.json")):  # calibrated, and labelling
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = subprocess.run([*begun, "--out", str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for stage in ("1-supervised", "3-retrain"):
        ours, theirs = (torch.load(one / "stages" / stage / "best.pt", weights_only=True)["model"]
                        for one in (out, run))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    for path in (run / "stages" / "2-label" / "masks").rglob("*.png"):
        assert (out / path.relative_to(run)).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_command_calibrates_a_checkpoint(run, tmp_path, capsys):
    best, out = run / "stages" / "1-supervised" / "best.pt", tmp_path / "deep.json"
    code, said, _ = ended(capsys, "calibrate", "--checkpoint", best, "--out", out, "--device", "cpu",
                          "--target-precision", "0.3", "0.99")
    assert code == 0
    assert all(text in said for text in ("held-out.txt", "views: flip", "for a precision of 99 %"))
    ours, theirs = calibration.read(out), calibration.read(best.parent / "calibration.json")
    assert np.abs(ours.all_CB - theirs.all_CB).sum() <= 0.02 * theirs.all_CB.sum()
    assert out.with_suffix(".svg").read_text().startswith("<svg xmlns=")
    code, said, _ = ended(capsys, "calibrate", "--checkpoint", best, "--out", out, "--device", "cpu", "--tta",
                          "none", "--list", run / "split" / "val.txt")
    assert code == 0 and "val.txt" in said
    assert "--consistency.class-confidence" in said or "not reached" in said
    assert "must be between 0 and 1" in refused(capsys, "calibrate", "--checkpoint", best,
                                                "--target-precision", "1")


@pytest.mark.slow
def test_corpus_is_labelled_with_its_teachers_calibration(run, synthetic, tmp_path, capsys):
    best = run / "stages" / "1-supervised" / "best.pt"
    begin = ["label", "--teacher", best, "--source", synthetic / "JPEGImages", "--device", "cpu"]
    auto = ["--min-confidence", "auto", "--target-precision", "0.3", "--tta", "flip"]
    code, _, said = ended(capsys, *begin, *auto, "--class-confidence", "box=0.99", "--out", tmp_path / "a")
    assert code == 0, said
    floors = json.loads((tmp_path / "a" / "run.json").read_text())["fingerprint"]["floors"]
    expected = list(calibration.read(best.parent / "calibration.json").floors(0.3))
    expected[CLASSES.index("box")] = 0.99
    assert floors == expected
    errors = refused(capsys, *begin, *auto[:-1], "none", "--out", tmp_path / "b")
    assert "calibration.json was measured with flip views" in errors and "--tta none" in errors
    errors = refused(capsys, *begin, "--min-confidence", "auto", "--out", tmp_path / "b")
    assert "--min-confidence auto and --target-precision require each other" in errors
    other = run / "stages" / "3-retrain" / "best.pt"
    errors = refused(capsys, "label", "--teacher", other, *begin[3:], *auto, "--out", tmp_path / "b",
                     "--calibration", best.parent / "calibration.json")
    assert "calibration.json was measured with other weights" in errors
    small = tmp_path / "small.json"
    code, _, said = ended(capsys, "calibrate", "--checkpoint", best, "--out", small, "--device", "cpu",
                          "--tta", "flip", "--target-precision", "0.3", "--view-px", "40")
    assert code == 0, said
    errors = refused(capsys, *begin, *auto, "--out", tmp_path / "b", "--calibration", small)
    assert "small.json was measured with another view size or output stride" in errors
    errors = refused(capsys, *begin, "--class-confidence", "pole=0.5", "--out", tmp_path / "b")
    assert "--class-confidence: unknown class pole" in errors


def test_thresholds_by_precision_need_held_out_labels(synthetic, synthetic_index, tmp_path, capsys):
    split = tmp_path / "split"
    split.mkdir()
    names = sorted(path.stem for path in (synthetic / "JPEGImages").glob("*.jpg"))
    (split / "labeled.txt").write_text("".join(f"JPEGImages/{name}.jpg\n" for name in names[:4]))
    (split / "unlabeled.txt").write_text("".join(f"JPEGImages/{name}.jpg\n" for name in names[4:8]))
    begin = ["train", "--data.root", synthetic, "--data.index", synthetic_index, "--data.layout", "voc",
             "--device", "cpu", "--method", "st", "--model.backbone", "resnet18"]
    errors = refused(capsys, *begin, "--data.split", split, "--label.min-confidence", "auto",
                     "--label.precision", "0.9", "--out", tmp_path / "a")
    assert "there is no validation list; give --advise.share 0.1" in errors
    errors = refused(capsys, *begin, "--data.split", split, "--label.class-confidence", "pole=0.5", "--out",
                     tmp_path / "b")
    assert "--label.class-confidence: unknown class pole" in errors
    errors = refused(capsys, *begin, "--label.min-confidence", "auto", "--out", tmp_path / "c")
    assert "--label.precision" in errors


def trainer(known: index.Index, folder: Path, validate) -> Trainer:
    """Six steps with every remedy of training."""
    config = Config(deterministic=True, data=DataConfig(threads=1),
                    model=ModelConfig(backbone="resnet18", output_stride=16),
                    augment=AugmentConfig(crop_px=33, long_side=(40, 80)),
                    rare=RareConfig(weights="effective", effective_pixels=1e4, logit_adjustment=0.5,
                                    sampling=0.5),
                    train=TrainConfig(batch_global=4, lr=0.05, precision="fp32", loss="ohem-image"))
    here = distributed.World(device=torch.device("cpu"))
    samples = [known.sample(image) for image in sorted(known.entries)]
    step = Supervised(fresh_network(config, here, CLASSES, stage=1), config)
    pixels = [sum(column) for column in zip(*known.class_pixels(samples), strict=True)]
    step.rules = class_rules.for_run(config, CLASSES, pixels, here.device)
    streams = [dataclasses.replace(stream, preference=rare_images.preference(
        samples, 6, config.rare, here, 1)) for stream in step.streams(config, samples)]
    return Trainer(config, here, step, streams, key=1, title="t", classes=CLASSES, folder=folder,
                   schedule=Schedule(steps=6, validate_steps=2), validate=validate)


def test_training_with_every_remedy_resumes_exactly(synthetic_index, tmp_path):
    known = index.load(synthetic_index)
    trainer(known, tmp_path / "whole", lambda _: Scores(miou=1.0)).run()

    def fails(_) -> Scores:
        if (tmp_path / "broken" / "last.pt").exists():
            raise RuntimeError("power cut")
        return Scores(miou=1.0)

    with pytest.raises(RuntimeError, match="power cut"):
        trainer(known, tmp_path / "broken", fails).run()
    trainer(known, tmp_path / "broken", lambda _: Scores(miou=1.0)).run()
    ours, theirs = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                    for name in ("broken", "whole"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
