"""Pseudo labels by class: least confidences, kept shares, and the selection of images."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import label_cases as cases
from conftest import torchrun
from stpp.config import DataConfig, LabelConfig
from stpp.errors import UserError
from stpp.images.masks import read_index_mask
from stpp.images.pixels import normalised
from stpp.images.sources import open_source
from stpp.inference import calibration, views
from stpp.inference.predictors import OpenedPredictor, already_open
from stpp.label import labels, reliability, rows, thresholds
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus

RANK = str(Path(__file__).parents[1] / "faults" / "label_rank.py")
TEACHER = str(Path(RANK).parent)
IMAGES = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return cases.as_folder(tmp_path_factory.mktemp("corpus"), cases.good_files(IMAGES))


def masks_of(out: Path) -> dict[str, np.ndarray]:
    return {row["key"]: read_index_mask(out / "masks" / f"{row['key']}.png")
            for row in rows.read_parts(out, "labels")}


def confidences(corpus: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns class and confidence of every pixel by the labeller's own sums, without any threshold."""
    seen = {}
    for name in cases.good_files(IMAGES):
        image = torch.from_numpy(np.asarray(Image.open(corpus / name))[None].copy())
        sums = views.accumulate(cases.Tiny(), normalised(image).permute(0, 3, 1, 2), "flip")[0]
        seen[name.removesuffix(".jpg")] = (sums.argmax(0).numpy(), (sums.amax(0) / sums.sum(0)).numpy())
    return seen


def run(corpus: Path, out: Path, floors=lambda _: (), **config) -> dict[str, np.ndarray]:
    given_config = LabelConfig(**{"tta": "flip", "batch_per_rank": 3, "shard_size": 5} | config)
    task = Assignment(source=open_source(str(corpus)), out=out, config=given_config,
                      data=DataConfig(threads=1, loader="reference"))
    label_corpus(already_open(cases.Tiny(), identity="tiny"), task, cases.HERE, floors=floors)
    return masks_of(out)


def test_pixels_below_the_threshold_of_their_class_are_ignored(corpus, tmp_path):
    floors = (0.3, 0.6, calibration.NEVER, 0.0)
    asked = []

    def of_teacher(opened: OpenedPredictor) -> tuple[float, ...]:
        asked.append(opened.identity)
        return floors

    found = run(corpus, tmp_path / "out", of_teacher)
    assert asked == ["tiny"]
    kept = 0
    for key, (classes, confidence) in confidences(corpus).items():
        sure = confidence >= np.array(floors)[classes]
        certain = np.abs(confidence - np.array(floors)[classes]) > 1e-5
        assert np.array_equal(found[key][certain], np.where(sure, classes, 255)[certain])
        assert 2 not in found[key]
        kept += sure.sum()
    table = list(rows.read_parts(tmp_path / "out", "labels"))
    assert abs(sum(sum(row["class_pixels"]) for row in table) - kept) <= 5
    with pytest.raises(UserError, match="floors: .* -> "):
        run(corpus, tmp_path / "out", lambda _: (0.3, 0.6, 0.0, 0.0))


def test_each_class_keeps_its_share_of_the_pixels(corpus, tmp_path):
    found = run(corpus, tmp_path / "out", keep_share=0.6)
    by_class: dict[int, list[float]] = {i: [] for i in range(4)}
    for classes, confidence in confidences(corpus).values():
        for i in range(4):
            by_class[i] += confidence[classes == i].tolist()
    kept = Counter(np.concatenate([mask.ravel() for mask in found.values()]).tolist())
    for i, values in by_class.items():
        # At least the share, and at most a bin more.
        bins = thresholds.bins(torch.tensor(values)).numpy()
        bin_of_quantile = np.quantile(bins, 0.4, method="lower")
        assert 0.6 * len(values) - 2 <= kept[i] <= (bins >= bin_of_quantile).sum() + 2
        assert kept[i] < 0.7 * len(values)


@given(st.lists(st.lists(st.integers(0, 50), min_size=20, max_size=20), min_size=1, max_size=4),
       st.floats(0.01, 1))
def test_quantiles_keep_the_share_within_one_bin(counts, share):
    for row, found in zip(counts, thresholds.quantiles(np.array(counts), share), strict=True):
        place = round(-np.log2(1 - found) * thresholds.BINS_PER_OCTAVE)
        if not sum(row):
            assert found == 0
            continue
        assert sum(row[place:]) >= share * sum(row)
        assert place == 19 or sum(row[place + 1:]) < share * sum(row)


@given(st.floats(0.05, 0.95), st.floats(6, 12), st.floats(0.5, 1.5))
def test_share_is_kept_of_a_class_with_hardly_a_doubt(share, octaves, spread):
    """Most of its pixels may have a confidence above 0.999."""
    doubt = np.exp2(-np.random.default_rng(0).normal(octaves, spread, 20_000))
    confidence = torch.from_numpy(1 - doubt.clip(0, 0.9)).float()
    counts = torch.bincount(thresholds.bins(confidence), minlength=4000)[None].numpy()
    (floor,) = thresholds.quantiles(counts, share)
    kept = (confidence >= torch.tensor(floor, dtype=torch.float32)).double().mean()
    certain = (confidence > 1 - 2.0**-19.9).double().mean()
    assert share <= kept <= max(share + 0.02, certain + 1e-9)


@pytest.mark.parametrize("size", [(48, 36), (96, 72), (200, 150), (31, 47)])
def test_thresholds_apply_to_the_class_of_the_written_mask(size):
    """The mask is resized from the sums of the view; so is the confidence."""
    torch.manual_seed(1)
    sums = torch.softmax(3 * torch.randn(2, 4, 96, 72), 1).contiguous()
    floors = (0.4, 0.7, calibration.NEVER, 0.5)
    job = labels.LabelJob(network=cases.Tiny(), teacher="", mode="none", min_confidence=0.0, output="png",
                          floors=floors)
    masks, _, pixels, _ = job._queued(sums, size).read()
    most, classes = views.resize_sums(sums, size).max(1)
    share = most / views.resize_sums(sums.sum(1, keepdim=True), size)[:, 0]
    floor = torch.tensor(floors)[classes]
    clear = (share - floor).abs() > 1e-5
    assert torch.equal(masks[clear].long(), torch.where(share >= floor, classes, 255)[clear])
    assert not (masks == 2).any() and pixels[:, 2].sum() == 0 and (masks != 255).any()
    assert torch.equal(views.confidence_of_sums(sums, size), share)


def test_larger_threshold_of_a_class_applies(corpus, tmp_path):
    both = run(corpus, tmp_path / "both", lambda _: (0.0, 0.9, 0.0, 0.0), keep_share=0.6)
    share = run(corpus, tmp_path / "share", keep_share=0.6)
    floors = run(corpus, tmp_path / "floors", lambda _: (0.0, 0.9, 0.0, 0.0))
    for key, mask in both.items():
        assert np.array_equal(mask, np.where(floors[key] == 255, 255, share[key]))
    assert any((both[key] != share[key]).any() for key in both)


def test_resumed_call_keeps_its_thresholds(corpus, tmp_path, monkeypatch):
    whole = cases.contents(tmp_path / "whole") if run(corpus, tmp_path / "whole", keep_share=0.6) else {}
    run(corpus, tmp_path / "out", keep_share=0.6)
    for shard in (tmp_path / "out" / "shards").glob("*.done.json"):
        shard.unlink()
    monkeypatch.setattr(thresholds, "_counts", lambda *_: pytest.fail("they were counted again"))
    run(corpus, tmp_path / "out", keep_share=0.6)
    assert cases.contents(tmp_path / "out") == whole
    (tmp_path / "out" / "plan" / thresholds.NAME).write_text("{}")
    with pytest.raises(UserError, match="class-confidence.json: cannot be read"):
        run(corpus, tmp_path / "out", keep_share=0.6)


def arguments(command: str, source: Path, out: Path, *more: str) -> list[str]:
    teachers = ["--teacher", TEACHER] if command == "label" else ["--checkpoints", TEACHER, TEACHER]
    return [command, *teachers, "--source", str(source), "--out", str(out), "--shard-size", "3", "--tta",
            "none", "--device", "cpu", "--compute-threads", "1", "--threads", "1", "--loader", "reference",
            *more]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), [
    ("label", ["--keep-share", "0.5", "--class-confidence", "b=0.6"]), ("select", ["--select-by", "class"])])
def test_two_ranks_with_one_killed_write_the_same_as_one(corpus, tmp_path, command, more):
    def begun(out: str, *trap: str) -> list[str]:
        return [RANK, *(trap or ("none", "", "0", "")), *arguments(command, corpus, tmp_path / out, *more)]

    alone = subprocess.run([sys.executable, *begun("alone")], capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    two = torchrun(2, *begun("two"))
    assert two.returncode == 0, two.stderr
    commit = {"label": "replace */plan/class-confidence.json",
              "select": "replace */scores/part-*.parquet"}[command]
    killed = torchrun(2, *begun("killed", "kill", commit, "1", str(tmp_path / "pid")))
    assert killed.returncode and (tmp_path / "pid").exists()
    again = torchrun(2, *begun("killed"))
    assert again.returncode == 0, again.stderr
    expected = cases.contents(tmp_path / "alone")
    assert cases.contents(tmp_path / "two") == cases.contents(tmp_path / "killed") == expected


@given(st.lists(st.tuples(st.floats(0, 1), st.lists(st.sampled_from([0, 0, 1, 50, 1000]), min_size=3,
                                                    max_size=3)), max_size=40))
def test_half_of_the_images_of_each_class_are_reliable(images):
    scores, pixels = [score for score, _ in images], [counts for _, counts in images]
    chosen, rest = reliability.split_by_class(scores, pixels)
    assert len(chosen) == len(images) // 2 and sorted(chosen + rest) == list(range(len(images)))
    for part in (chosen, rest):
        assert [scores[i] for i in part] == sorted((scores[i] for i in part), reverse=True)
    shown = [{c for c, count in enumerate(counts) if count and count >= 0.001 * sum(counts)}
             for counts in pixels]
    frequency = Counter(c for classes in shown for c in classes)
    groups: dict[int, list[int]] = {}
    for i, classes in enumerate(shown):
        groups.setdefault(min(classes, key=lambda c: (frequency[c], c), default=-1), []).append(i)
    for members in groups.values():
        kept = [i for i in members if i in chosen]
        assert len(members) // 2 <= len(kept) <= -(-len(members) // 2)
        lost = [scores[i] for i in members if i not in kept]
        assert not kept or not lost or min(scores[i] for i in kept) >= max(lost)


def test_rare_class_keeps_its_most_reliable_images():
    scores, pixels = [0.9] * 6 + [0.1, 0.2], [[1000, 0]] * 6 + [[990, 10]] * 2
    assert reliability.split_by_reliability(scores)[0] == [0, 1, 2, 3]
    assert reliability.split_by_class(scores, pixels)[0] == [0, 1, 2, 7]
    specks = [[1000, 0]] * 6 + [[999_999, 1]] * 2  # less than a thousandth: the class does not count as shown
    assert reliability.split_by_class(scores, specks)[0] == [0, 1, 2, 3]


def test_selection_by_class_uses_the_last_teachers_masks(corpus, tmp_path):
    task = Assignment(source=open_source(str(corpus)), out=tmp_path, table="scores",
                      data=DataConfig(threads=1, loader="reference"), config=LabelConfig(select_by="class"))
    reliability.select_corpus(already_open(cases.Tiny(), cases.Tiny(), identity="tiny"), task, cases.HERE)
    table = list(rows.read_parts(tmp_path, "scores"))
    assert len(table) == IMAGES
    for row in table:
        mask = cases.plain_mask(cases.Tiny(), corpus / f"{row['key']}.jpg", (1.0,), False)
        assert np.abs(np.bincount(mask.ravel(), minlength=4) - row["class_pixels"]).sum() <= 4
    found = json.loads((tmp_path / "run.json").read_text())["fingerprint"]
    assert found["select_by"] == "class"
    assert len((tmp_path / "reliable_ids.txt").read_text().splitlines()) == IMAGES // 2


class Undecided(cases.Tiny):
    """Teacher whose logits are NaN for a bright image."""

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        low_NChw = super().logits(images_NCHW)
        low_NChw[images_NCHW.mean((1, 2, 3)) > 1.5] = float("nan")
        return low_NChw


def test_images_with_logits_that_are_not_finite_have_no_reliability(tmp_path):
    """Equal masks of NaN would make them the most reliable."""
    files = cases.good_files(4) | {"white.png": cases.encoded(Image.new("RGB", (64, 48), "white"), "PNG")}
    task = Assignment(source=open_source(str(cases.as_folder(tmp_path / "in", files))), out=tmp_path / "out",
                      table="scores", data=DataConfig(threads=1, loader="reference"), config=LabelConfig())
    networks = (Undecided(), cases.Tiny(), cases.Tiny())
    summary = reliability.select_corpus(already_open(*networks, identity="tiny"), task, cases.HERE)
    (bad,) = rows.read(tmp_path / "out" / "failed.parquet")
    assert summary.bad == 1 and (bad["key"], bad["error"]) == ("white", labels.NOT_FINITE)
    assert "white" not in {row["key"] for row in rows.read(tmp_path / "out" / "reliability.parquet")}


def test_thresholds_see_every_part_of_a_corpus(tmp_path, monkeypatch):
    """The first shard may be a folder whose images differ from all others."""
    foggy = {f"a/{i:03d}.png": cases.picture(100 + i).point(lambda value: 112 + value // 8)
             for i in range(20)}
    clear = {f"b/{i:03d}.png": cases.picture(i) for i in range(60)}
    files = {name: cases.encoded(image, "PNG") for name, image in (foggy | clear).items()}
    source = cases.as_folder(tmp_path / "in", files)
    monkeypatch.setattr(thresholds, "MOST_IMAGES", 16)
    cases.run(source, tmp_path / "out", tta="none", keep_share=0.5, shard_size=20)
    kept = sum(sum(row["class_pixels"]) for row in rows.read_parts(tmp_path / "out", "labels"))
    assert 0.35 < kept / (80 * 64 * 48) < 0.65
