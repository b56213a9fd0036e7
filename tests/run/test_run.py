"""Stages of a run, from files to results.json, on a tiny data set."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import torchrun
from run_cases import TINY
from stpp import distributed
from stpp.config import Config, DataConfig, TrainConfig, load_recipe
from stpp.dataset import index as indices
from stpp.errors import UserError
from stpp.images.masks import read_index_mask, write_index_png
from stpp.images.palette import colourise
from stpp.label import reliability, rows
from stpp.report.examples import PICTURE_PX
from stpp.run.start import _without_effect, start
from stpp.training.trainer import Trainer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(TINY)
    return path


def stpp(*args, expect: int = 0) -> subprocess.CompletedProcess:
    ran = subprocess.run([sys.executable, "-m", "stpp", *map(str, args)], capture_output=True, text=True,
                         timeout=280)
    assert ran.returncode == expect, ran.stderr
    return ran


@pytest.fixture(scope="module")
def run(recipe, synthetic, synthetic_index, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stpp"
    stpp("train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index, "--out", out,
         "--control")
    return out


def test_stpp_runs_the_stages_of_the_paper(run):
    stages = run / "stages"
    for name in ("1-supervised", "4-retrain", "6-retrain", "control"):
        assert {"last.pt", "best.pt", "metrics.jsonl", "DONE.json"} <= set(os.listdir(stages / name))
    assert {"third-1.pt", "third-2.pt", "third-3.pt"} <= set(os.listdir(stages / "1-supervised"))
    reliable, unreliable = ((stages / "2-select" / name).read_text().splitlines()
                            for name in ("reliable_ids.txt", "unreliable_ids.txt"))
    unlabelled = (run / "split" / "unlabeled.txt").read_text().splitlines()
    assert len(reliable) == len(unlabelled) // 2
    assert sorted(reliable + unreliable) == sorted(unlabelled)
    scores = {row["key"]: row["reliability"]
              for row in rows.read(stages / "2-select" / "reliability.parquet")}
    of = [scores[line.split()[0].rpartition(".")[0]] for line in reliable + unreliable]
    assert of == sorted(of, reverse=True) and all(0 <= score <= 1 for score in of)


def test_each_half_has_its_pseudo_labels(run, synthetic):
    for stage, list_name in (("3-label", "reliable_ids.txt"), ("5-label", "unreliable_ids.txt")):
        lines = (run / "stages" / "2-select" / list_name).read_text().splitlines()
        table = list(rows.read_parts(run / "stages" / stage, "labels"))
        assert sorted(row["key"]
                      for row in table) == sorted(line.split()[0].rpartition(".")[0] for line in lines)
        for row in table:
            mask = read_index_mask(run / "stages" / stage / "masks" / f"{row['key']}.png")
            image = Image.open(synthetic / f"{row['key']}.jpg")
            assert mask.shape == (image.height, image.width) == (row["height"], row["width"])
            assert np.bincount(mask.ravel(), minlength=6).tolist() == row["class_pixels"]
            assert 0 < row["mean_confidence"] <= 1


def test_results_name_every_stage(run):
    results = json.loads((run / "results.json").read_text())
    assert results["method"] == "stpp"
    assert [stage["name"] for stage in results["stages"]] == [
        "1-supervised", "2-select", "3-label", "4-retrain", "5-label", "6-retrain"]
    trained = [stage for stage in results["stages"] if stage["steps"]] + [results["control"]]
    assert all(0 <= stage["miou"] <= 100 and stage["seconds"] > 0 for stage in trained)
    # 8 labels twice in batches of 4 are 4 steps an epoch; the whole list of stage 6 is 2 x 8 labels and 16
    # images.
    assert [stage["steps"] for stage in trained] == [12, 4, 8, 8]
    assert results["control"]["name"] == "control"
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert (
        "5-label" in page
        and "6-retrain" in page
        and "IoU per class" in page
        and "Not compared" not in page
    )
    assert len(json.loads((run / "stages" / "6-retrain" / "scores.json").read_text())["iou"]) == 6


def test_tensorboard_shows_curves_and_fixed_images(run, synthetic):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "stages" / "1-supervised"
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    classes = json.loads((run / "provenance.json").read_text())["classes"]
    assert {"loss", "lr", "images_per_s", "data_wait_pct", "miou_pct"} <= set(board.Tags()["scalars"])
    miou = {event.step: event.value for event in board.Scalars("miou_pct")}
    assert list(miou) == [4, 8, 12]
    for step, mean in miou.items():
        iou = [event.value for name in classes if f"iou_pct/{name}" in board.Tags()["scalars"]
               for event in board.Scalars(f"iou_pct/{name}") if event.step == step]
        assert sum(iou) / len(iou) == pytest.approx(mean, abs=1e-3)
    assert len(board.Tags()["images"]) == 3  # every other one of six
    for tag in board.Tags()["images"]:
        assert [event.step for event in board.Images(tag)] == list(miou)
        picture = np.asarray(Image.open(io.BytesIO(board.Images(tag)[-1].encoded_image_string)))
        name = tag.removeprefix("validation/JPEGImages/")
        mask = Image.open(synthetic / "SegmentationClass" / f"{name}.png")
        scale = min(1, PICTURE_PX / max(mask.size))
        width, height = (round(side * scale) for side in mask.size)
        assert picture.shape == (height, 3 * width + 8, 3)
        truth = Image.fromarray(colourise(np.asarray(mask),
                                          len(classes))).resize((width, height), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(picture[:, width + 4 : 2 * width + 4], np.asarray(truth))
        image = np.asarray(
            Image.open(synthetic / "JPEGImages" / f"{name}.jpg").resize((width, height), Image.Resampling.BOX)
        )
        assert abs(picture[:, :width].astype(int) - image).mean() < 3
        colours = {tuple(colour) for colour in picture[:, 2 * width + 8 :].reshape(-1, 3).tolist()}
        assert colours <= set(map(tuple, colourise(np.arange(len(classes)), len(classes)).tolist()))


def test_finished_run_is_not_repeated(run, recipe, synthetic, synthetic_index):
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/**/*") if path.is_file()}
    again = stpp("train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index,
                 "--out", run)
    assert "done before" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.glob("stages/**/*") if path.is_file()} == before


def test_changed_config_is_refused_with_its_keys(run, recipe, synthetic):
    refused = stpp("train", "--recipe", recipe, "--data.root", synthetic, "--out", run, "--train.epochs", "2",
                   "--method", "st", expect=2)
    assert "train.epochs: 1 -> 2" in refused.stderr and "method: stpp -> st" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_changed_data_is_refused(run, recipe, synthetic, tmp_path):
    out, root = tmp_path / "run", tmp_path / "data"
    shutil.copytree(synthetic, root)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.pt"))
    mask = next((root / "SegmentationClass").iterdir())
    write_index_png(mask, np.flipud(read_index_mask(mask)).copy())
    args = ["train", "--recipe", recipe, "--data.root", root, "--data.index", tmp_path / "index", "--out",
            out]
    assert "changed since this run began" in stpp(*args, expect=2).stderr


def test_run_resumes_with_a_copy_of_its_data_set(run, recipe, synthetic, tmp_path):
    out, root = tmp_path / "run", tmp_path / "scratch" / "data"
    shutil.copytree(run, out)
    shutil.copytree(synthetic, root, copy_function=shutil.copyfile)  # with new times
    for stage in ("5-label", "6-retrain"):
        shutil.rmtree(out / "stages" / stage)
    stpp("train", "--recipe", recipe, "--data.root", root, "--data.index", tmp_path / "index", "--out", out)
    weights = [torch.load(folder / "stages" / "6-retrain" / "best.pt", weights_only=True)["model"]
               for folder in (out, run)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


@pytest.mark.dist
def test_evaluate_counts_every_image_once_on_two_ranks(run, synthetic, tmp_path):
    args = ["evaluate", "--checkpoint", str(run / "stages" / "6-retrain" / "best.pt"), "--index",
            json.loads((run / "config.json").read_text())["data"]["index"], "--precision", "fp32"]
    stpp(*args, "--out", tmp_path / "one.json")
    ran = torchrun(2, "-m", "stpp", *args, "--out", str(tmp_path / "two.json"))
    assert ran.returncode == 0, ran.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 6
    assert two["miou"] == pytest.approx(one["miou"], abs=0.05)
    recorded = json.loads((run / "stages" / "6-retrain" / "DONE.json").read_text())["miou"]
    assert recorded == pytest.approx(one["miou"], abs=1.5)  # validated in another precision


@pytest.mark.dist
def test_two_ranks_complete_st(recipe, synthetic, synthetic_index, tmp_path):
    ran = torchrun(2, "-m", "stpp", "train", "--recipe", str(recipe), "--method", "st", "--data.root",
                   str(synthetic),
                   "--data.index", str(synthetic_index), "--out", str(tmp_path / "st"), timeout=280)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "st" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["1-supervised", "2-label", "3-retrain"]
    assert len(list((tmp_path / "st" / "stages" / "2-label" / "masks").rglob("*.png"))) == 16


def test_without_validation_the_last_checkpoint_is_the_teacher(recipe, synthetic, synthetic_index, tmp_path):
    split = tmp_path / "split"
    split.mkdir()
    names = (synthetic / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    (split / "labeled.txt").write_text("".join(f"JPEGImages/{n}.jpg "
                                               f"SegmentationClass/{n}.png\n" for n in names[:8]))
    (split / "unlabeled.txt").write_text("".join(f"JPEGImages/{n}.jpg\n" for n in names[8:]))
    ran = stpp("train", "--recipe", recipe, "--method", "supervised", "--data.root", synthetic,
               "--data.index", synthetic_index, "--data.split", split, "--out", tmp_path / "run")
    assert "no val.txt" in ran.stderr
    record = json.loads((tmp_path / "run" / "results.json").read_text())["stages"][0]
    assert (record["miou"], record["best_step"], record["steps"]) == (None, 12, 12)
    val = tmp_path / "val.txt"
    val.write_text("".join(f"JPEGImages/{n}.jpg SegmentationClass/{n}.png\n" for n in names[:2]))
    scored = stpp("evaluate", "--checkpoint", tmp_path / "run" / "stages" / "1-supervised" / "best.pt",
                  "--list", val)
    assert "2 images" in scored.stdout  # the index is the run's


def test_bad_lists_are_refused_in_one_line(recipe, synthetic, synthetic_index, tmp_path):
    good = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\n".format(
        (synthetic / "ImageSets" / "Segmentation" / "train.txt").read_text().split()[0])
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "labeled.txt").write_text(good)
    (lone / "unlabeled.txt").write_text(good)
    args = ["train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index]
    refused = stpp(*args, "--data.split", lone, "--out", tmp_path / "run", expect=2)
    assert "unlabeled.txt: 1 image, and --method stpp needs 2" in refused.stderr
    again = stpp(*args, "--data.split", tmp_path / "absent", "--out", tmp_path / "run", expect=2)
    assert "absent" in again.stderr  # a refused command does not claim the folder
    taken = tmp_path / "file"
    taken.touch()
    assert "--out" in stpp(*args, "--out", taken, expect=2).stderr
    alone = stpp(*args, "--train.batch-global", "1", "--out", tmp_path / "run", expect=2)
    assert "one image per rank" in alone.stderr
    cases = {"": "labeled.txt", "JPEGImages/absent.jpg SegmentationClass/absent.png\n": "absent.jpg",
             "../outside.jpg x.png\n": "outside.jpg"}
    for number, (text, named) in enumerate(cases.items()):
        split = tmp_path / f"split{number}"
        split.mkdir()
        (split / "labeled.txt").write_text(text)
        (split / "unlabeled.txt").write_text(good)
        refused = stpp("train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index,
                       "--data.split", split, "--out", tmp_path / f"run{number}", expect=2)
        assert named in refused.stderr and "Traceback" not in refused.stderr
        assert len([line for line in refused.stderr.splitlines() if line.startswith("stpp: ")]) == 1


def test_classes_of_checkpoint_and_index_must_agree(run, synthetic, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(synthetic, root)
    (root / "classes.json").write_text(json.dumps(["background", "disc", "box", "triangle", "star", "ring",
                                                   "extra"]))
    stpp("prepare", "--data.root", root, "--out", tmp_path / "index")
    refused = stpp("evaluate", "--checkpoint", run / "stages" / "1-supervised" / "best.pt", "--index",
                   tmp_path / "index", expect=2)
    assert "6 classes" in refused.stderr and "extra" in refused.stderr


@pytest.mark.parametrize(("scores", "reliable"), [
    ([0.1, 0.9, 0.5, 0.9], [1, 3]), ([0.5, 0.5, 0.5], [0]), ([0.3], []), ([0.2, 0.4], [1])])
def test_first_half_is_reliable_and_ties_keep_their_order(scores, reliable):
    first, rest = reliability.split_by_reliability(scores)
    assert first == reliable
    assert sorted(first + rest) == list(range(len(scores)))


def test_out_of_memory_names_the_option_in_one_line(recipe, synthetic, synthetic_index, tmp_path,
                                                    monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a page of advice")

    monkeypatch.setattr(Trainer, "train_step", full)
    config = load_recipe(Config, recipe)
    config = dataclasses.replace(config, out=tmp_path, deterministic=False,
                                 data=dataclasses.replace(config.data, root=synthetic, index=synthetic_index))
    with distributed.world("cpu") as here, pytest.raises(UserError) as raised:
        start(config, here)
    said = str(raised.value)
    assert "\n" not in said
    assert all(text in said
               for text in ("1-supervised", "2.00 GiB", "--train.accumulate 2", "--label.batch-pixels"))


def test_changed_lists_are_refused(run, recipe, synthetic, synthetic_index, tmp_path):
    """Of a drawn split and of the user's own; scores of stages on different lists would not compare."""
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    shutil.rmtree(copied / "stages" / "6-retrain")
    command = ("train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index,
               "--out", copied, "--control")
    labelled = copied / "split" / "labeled.txt"
    text = labelled.read_text()
    labelled.write_text("".join(text.splitlines(keepends=True)[1:]))
    assert "labeled.txt: is another list" in stpp(*command, expect=2).stderr
    labelled.write_text(text)
    provenance = copied / "provenance.json"
    recorded = json.loads(provenance.read_text())
    provenance.write_text(json.dumps(recorded | {"lists": "0123456789abcdef"}))
    assert "the lists of images changed since this run began" in stpp(*command, expect=2).stderr
    assert not (copied / "stages" / "6-retrain").exists()


def test_run_is_not_written_over_a_data_set(recipe, synthetic, synthetic_index, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(synthetic, root)
    (root / "split").mkdir()
    (root / "split" / "val.txt").write_text("mine\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    said = stpp("train", "--recipe", recipe, "--data.root", root, "--data.index", tmp_path / "index",
                "--out", root, expect=2).stderr
    assert f"--out {root}: contains split, which stpp did not write" in said
    now = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path: now[path] for path in before} == before


def test_shared_index_of_another_root_is_not_rewritten(recipe, synthetic, synthetic_index, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(synthetic, root)
    before = (synthetic_index / "index.json").read_bytes()
    said = stpp("train", "--recipe", recipe, "--data.root", root, "--data.index", synthetic_index, "--out",
                tmp_path / "run", expect=2).stderr
    assert "prepared with other settings (root)" in said
    assert (synthetic_index / "index.json").read_bytes() == before


def test_index_in_use_is_not_rewritten(synthetic, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(synthetic, root)
    made = indices.prepare(root, tmp_path / "index", progress=False)
    mask = next(path for path in root.rglob("*.png") if path.parent.name in ("masks", "SegmentationClass"))
    Image.open(mask).save(mask, compress_level=0)
    with indices.in_use(made.out):
        said = stpp("prepare", "--data.root", root, "--out", made.out, expect=2).stderr
    assert "a run is training on this index" in said
    assert indices.load(made.out).contents == made.contents
    stpp("prepare", "--data.root", root, "--out", made.out)


@pytest.mark.parametrize(("method", "train", "data", "flags"), [
    ("retrain", {"from_teacher": True}, {}, ["--train.from-teacher has no effect with --method retrain"]),
    ("supervised", {"from_teacher": True, "supervised_steps": 5}, {}, ["--train.from-teacher has no effect"]),
    ("unimatch", {"supervised_steps": 5}, {},
     ["--train.supervised-steps has no effect with --method unimatch, which has no stage on the labels alone "
      "without --train.from-teacher"]),
    ("unimatch", {"supervised_steps": 5, "from_teacher": True}, {}, []),
    ("retrain", {"supervised_epochs": 5}, {}, ["--train.supervised-epochs has no effect"]),
    ("stpp", {"from_teacher": True, "supervised_steps": 5}, {}, []),
    ("st", {}, {"split": Path("lists"), "fraction": "1/2"}, ["--data.fraction 1/2"]),
])
def test_settings_without_effect_are_said(method, train, data, flags):
    config = Config(method=method, train=TrainConfig(**train), data=DataConfig(**data),
                    pseudo_labels=Path("labels") if method == "retrain" else None)
    said = _without_effect(config)
    assert len(said) == len(flags)
    assert all(line.startswith(flag) for line, flag in zip(said, flags, strict=True))


def test_shared_index_of_other_settings_is_not_rewritten(recipe, synthetic, synthetic_index, tmp_path):
    """Another run may be training on its masks."""
    before = (synthetic_index / "index.json").read_bytes()
    said = stpp("train", "--recipe", recipe, "--data.root", synthetic, "--data.index", synthetic_index,
                "--data.no-exif", "--out", tmp_path / "run", expect=2).stderr
    assert "prepared with other settings (exif)" in said and "choose another folder" in said
    assert (synthetic_index / "index.json").read_bytes() == before
