"""`stpp evaluate`: overlapping crops against a plain form, and checkpoints that lack a description."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import engine_cases as cases
from cli_cases import ended
from conftest import torchrun
from stpp import checkpoint, cli, distributed
from stpp.config import Config, DataConfig, TrainConfig
from stpp.dataset import index
from stpp.errors import UserError
from stpp.images.masks import read_index_mask
from stpp.images.pixels import normalised
from stpp.inference import views
from stpp.inference.evaluate import evaluate
from stpp.inference.open import EagerPredictor
from stpp.run.run import Run

CPU = torch.device("cpu")
HERE = distributed.World(device=CPU)
STRIDE = 16


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return cases.seeing_all_classes()


@pytest.fixture(scope="module")
def best(network, tmp_path_factory, synthetic_index) -> Path:
    return cases.saved(tmp_path_factory.mktemp("checkpoint") / "best.pt", network,
                       index.load(synthetic_index).classes, output_stride=STRIDE)


def flags(best: Path, index_folder: Path, listed: Path, *more: object) -> list[str]:
    return ["evaluate", "--checkpoint", *map(str, (best, "--index", index_folder, "--list", listed, *more)),
            "--device", "cpu",
            "--precision", "fp32", "--loader", "reference"]


def command(capsys, *args) -> tuple[int, str, str]:
    """Runs `stpp evaluate`; returns exit code, standard output, standard error."""
    return ended(capsys, *flags(*args))


# --- crops


def sliding(network: torch.nn.Module, image_1CHW: torch.Tensor, side: int,
            mirrored: bool = False, edges: str = "cut") -> torch.Tensor:
    """Computes mean probabilities [1, C, H, W] of crops, one pixel column and row of their grid after the
    other, in plain PyTorch."""
    if edges == "shifted":
        return sliding_back(network, image_1CHW, side, mirrored)
    height, width = image_1CHW.shape[-2:]
    total, crops = torch.zeros(1, 6, height, width), torch.zeros(height, width)
    top = 0
    while top < height:
        left = 0
        while left < width:
            bottom, right = min(height, top + side), min(width, left + side)
            crop = image_1CHW[:, :, top:bottom, left:right].contiguous()
            for flip in (False, True)[: 1 + mirrored]:
                low = network(crop.flip(3) if flip else crop)
                prob = F.interpolate(low, crop.shape[-2:], mode="bilinear", align_corners=True).softmax(1)
                total[:, :, top:bottom, left:right] += prob.flip(3) if flip else prob
                crops[top:bottom, left:right] += 1
            left += int(side * 2 / 3)
        top += int(side * 2 / 3)
    assert crops.min() >= 1
    return total / crops


def predictor(network):
    return SimpleNamespace(logits=network, num_classes=6, view_px=None)


def sliding_back(network: torch.nn.Module, image_1CHW: torch.Tensor, side: int,
                 mirrored: bool) -> torch.Tensor:
    """The same with crops of one size: a crop that would leave the image is moved back, and is the last."""
    height, width = image_1CHW.shape[-2:]
    total, crops = torch.zeros(1, 6, height, width), torch.zeros(height, width)
    top, below = 0, True
    while below:
        below = top + side < height
        left, beside = 0, True
        while beside:
            beside = left + side < width
            crop = image_1CHW[:, :, top : top + side, left : left + side].contiguous()
            assert tuple(crop.shape[-2:]) == (min(side, height), min(side, width))
            for flip in (False, True)[: 1 + mirrored]:
                low = network(crop.flip(3) if flip else crop)
                prob = F.interpolate(low, crop.shape[-2:], mode="bilinear", align_corners=True).softmax(1)
                total[:, :, top : top + side, left : left + side] += prob.flip(3) if flip else prob
                crops[top : top + side, left : left + side] += 1
            left = min(left + int(side * 2 / 3), width - side)
        top = min(top + int(side * 2 / 3), height - side)
    assert crops.min() >= 1
    return total / crops


@pytest.mark.parametrize("edges", ["cut", "shifted"])
@pytest.mark.parametrize("mode", ["none", "flip"])
@pytest.mark.parametrize("size, side",
                         [((70, 110), 48), ((48, 48), 48), ((33, 90), 48), ((20, 31), 48), ((65, 33), 32),
                                        ((8, 9), 3)])
def test_crops_match_the_plain_form(network, mode, size, side, edges):
    images = cases.images(2, *size)
    with torch.no_grad():
        sums = views.accumulate_crops(network, images, mode, 6, side, edges)
        masks = views.masks(predictor(network), images, mode, crop_px=side, edges=edges)
        truth = torch.cat([sliding(network, image[None], side, mode == "flip", edges) for image in images])
    torch.testing.assert_close(sums / sums.sum(1, keepdim=True), truth, rtol=1e-3, atol=1e-4)
    decided = truth.topk(2, 1).values.diff(dim=1)[:, 0].abs() > 1e-3
    assert decided.float().mean() > 0.9 and torch.equal(masks[decided], truth.argmax(1).byte()[decided])


def test_cityscapes_windows_are_the_published_ones():
    """UniMatch, 801 pixels: rows 0 and 534, columns to the end; UniMatch-V2, 798: the last are moved back."""
    assert views.window_starts(1024, 801, "cut") == [0, 534]
    assert views.window_starts(2048, 801, "cut") == [0, 534, 1068, 1602]
    assert views.window_starts(1024, 798, "shifted") == [0, 226]
    assert views.window_starts(2048, 798, "shifted") == [0, 532, 1064, 1250]
    assert views.window_starts(798, 798, "shifted") == views.window_starts(500, 798, "shifted") == [0]


@given(length=st.integers(1, 300), side=st.integers(1, 120), edges=st.sampled_from(["cut", "shifted"]))
def test_windows_cover_every_pixel_within_the_image(length, side, edges):
    found = views.window_starts(length, side, edges)
    covered = {at for first in found for at in range(first, min(length, first + side))}
    assert covered == set(range(length))
    assert found == sorted(set(found)) and 0 <= found[0] and found[-1] < length
    if edges == "shifted":
        assert all(first + min(side, length) <= length for first in found)


def test_image_within_one_crop_is_one_window(network):
    images = cases.images(1, 40, 45)
    with torch.no_grad():
        whole, cropped, cut = (views.masks(predictor(network), images, "none", crop_px=side)
                               for side in (None, 68, 24))
    assert (whole == cropped).float().mean() > 0.999
    assert not torch.equal(whole, cut), "crops change nothing, so these tests show nothing"


def plain_miou(network: torch.nn.Module, known: index.Index, listed: Path, side: int, edges: str) -> float:
    """Percent: mean over the classes that occur."""
    both, either = np.zeros(6), np.zeros(6)
    for line in listed.read_text().splitlines():
        sample = known.sample(line.split()[0])
        image = torch.from_numpy(normalised(np.asarray(Image.open(sample.image).convert("RGB")))).permute(
            2, 0, 1
        )[None]
        with torch.no_grad():
            found = sliding(network, image, side, edges=edges).argmax(1)[0].numpy()
        truth = read_index_mask(sample.mask)
        counted = truth != 255
        for c in range(6):
            both[c] += (counted & (truth == c) & (found == c)).sum()
            either[c] += (counted & ((truth == c) | (found == c))).sum()
    return 100 * np.mean([both[c] / either[c] for c in range(6) if either[c]])


@pytest.mark.parametrize("edges", ["cut", "shifted"])
def test_score_matches_the_plain_form(network, best, synthetic_index, listed, tmp_path, capsys, edges):
    out = tmp_path / "scores.json"
    code, said, _ = command(capsys, best, synthetic_index, listed, "--sliding-window", "45", "--window-edges",
                            edges, "--out", out)
    assert code == 0 and "3 images" in said
    scores = json.loads(out.read_text())
    expected = plain_miou(network, index.load(synthetic_index), listed, 45, edges)
    assert scores["miou"] == pytest.approx(expected, abs=0.05)
    command(capsys, best, synthetic_index, listed, "--out", tmp_path / "whole.json")
    assert not math.isclose(json.loads((tmp_path / "whole.json").read_text())["miou"], scores["miou"],
                            abs_tol=0.05)


def test_every_pixel_counts_once_for_any_crop(network, synthetic_index):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)[:4]]
    teacher = EagerPredictor(network, num_classes=6, device=CPU, dtype=torch.float32)
    rows = {tuple(evaluate(teacher, samples, HERE, DataConfig(threads=1, loader="reference"), mode=mode,
                           crop_px=side)
                  .sum(1).tolist()) for mode,
            side in (("none", None), ("none", 1000), ("none", 50), ("flip", 50))}
    assert len(rows) == 1


@pytest.mark.dist
def test_ranks_share_the_images(best, synthetic_index, listed, tmp_path, capsys):
    args = (best, synthetic_index, listed, "--sliding-window", "45", "--out")
    command(capsys, *args, tmp_path / "one.json")
    ran = torchrun(2, "-m", "stpp", *flags(*args, tmp_path / "two.json"))
    assert ran.returncode == 0, ran.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 3 and two["miou"] == pytest.approx(one["miou"], abs=0.05)


@pytest.mark.parametrize("value", ["0", "-3", "wide"])
def test_impossible_crop_is_named(best, synthetic_index, listed, capsys, value):
    code, _, errors = command(capsys, best, synthetic_index, listed, "--sliding-window", value)
    assert code == 2 and "--sliding-window" in errors and len(errors.strip().splitlines()) == 1


def test_edges_without_windows_are_named(best, synthetic_index, listed, capsys):
    code, _, errors = command(capsys, best, synthetic_index, listed, "--window-edges", "shifted")
    assert code == 2 and "--sliding-window PX" in errors and len(errors.strip().splitlines()) == 1
    with pytest.raises(UserError, match="-edges is shifted: .*--train.validate-window"):
        TrainConfig(validate_window_edges="shifted")
    with pytest.raises(UserError, match="--train.validate-window is 0"):
        TrainConfig(validate_window=0)


@pytest.mark.parametrize("edges", [None, "cut", "shifted"])
def test_validation_and_evaluation_give_the_same_score(network, best, synthetic, synthetic_index, listed,
                                                       tmp_path, capsys, edges):
    """The same windows in training's validation and in `stpp evaluate`."""
    flags = ["--sliding-window", "45", "--window-edges", edges] if edges else []
    command(capsys, best, synthetic_index, listed, *flags, "--out", tmp_path / "scores.json")
    known, split = index.load(synthetic_index), tmp_path / "split"
    windows = {"validate_window": 45, "validate_window_edges": edges} if edges else {}
    config = Config(out=tmp_path, train=TrainConfig(precision="fp32", **windows),
                    data=DataConfig(root=synthetic, split=split_of(known, listed, split), threads=1,
                                    loader="reference"))
    scores = Run(config, HERE, known)._validated(network)
    assert scores.miou == pytest.approx(json.loads((tmp_path / "scores.json").read_text())["miou"], abs=1e-6)


def split_of(known: index.Index, val: Path, folder: Path) -> Path:
    """Writes the lists of a run that is validated on `val`."""
    folder.mkdir()
    lines = [f"{image} {entry.mask}\n" for image, entry in sorted(known.entries.items())]
    (folder / "labeled.txt").write_text("".join(lines[:2]))
    (folder / "unlabeled.txt").write_text("".join(lines[2:4]))
    (folder / "val.txt").write_text(val.read_text())
    return folder


# --- checkpoints without a description


def bare(folder: Path, state: dict, name: str = "published.pth") -> Path:
    torch.save(state, folder / name)
    return folder / name


@pytest.mark.parametrize("prefix, wrapper", [("", None), ("module.", None), ("module.", "model")])
def test_published_state_dict_scores_like_a_run_checkpoint(network, best, synthetic_index, listed, tmp_path,
                                                           capsys, prefix, wrapper):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    path = bare(tmp_path, {wrapper: state, "epoch": 3} if wrapper else state)
    code, said, errors = command(capsys, path, synthetic_index, listed, "--output-stride", STRIDE)
    assert code == 0 and said == command(capsys, best, synthetic_index, listed)[1]
    assert f"{path}: deeplabv3plus on resnet18, 6 classes" in errors and f"output stride {STRIDE}" in errors
    if prefix:
        return
    code, at_eight, errors = command(capsys, path, synthetic_index, listed)
    assert code == 0 and "output stride 8" in errors and at_eight != said


def test_wrong_number_of_classes_is_named(synthetic_index, listed, tmp_path, capsys):
    path = bare(tmp_path, cases.model("deeplabv2", classes=21).state_dict())
    code, _, errors = command(capsys, path, synthetic_index, listed)
    last = errors.strip().splitlines()[-1]
    assert (
        code == 2
        and "was trained on 21 classes" in last
        and "has 6" in last
        and "use the matching index" in last
    )


def test_state_dict_needs_an_index_and_a_list(network, tmp_path, capsys):
    path = bare(tmp_path, network.state_dict())
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "--checkpoint", str(path)])
    errors = capsys.readouterr().err
    assert (
        ended.value.code == 2
        and "--index" in errors
        and "--list" in errors
        and len(errors.strip().splitlines()) == 1
    )


def test_stride_that_contradicts_the_checkpoint_is_refused(best, synthetic_index, listed, capsys):
    assert command(capsys, best, synthetic_index, listed, "--output-stride", STRIDE)[0] == 0
    code, _, errors = command(capsys, best, synthetic_index, listed, "--output-stride", "8")
    assert (
        code == 2
        and "--output-stride 8" in errors
        and "trained at 16" in errors
        and len(errors.strip().splitlines()) == 1
    )


def test_origin_of_pretrained_weights_is_logged(best, synthetic_index, listed, tmp_path, capsys):
    content = checkpoint.load(best)
    del content["format"]
    record = {"source": "backbone.pth", "sha256": 64 * "0", "licence": "MIT"}
    checkpoint.save(tmp_path / "best.pt", **content, pretrained=record)
    code, _, errors = command(capsys, tmp_path / "best.pt", synthetic_index, listed)
    assert code == 0 and "started from backbone.pth (MIT, SHA-256 00000000)" in errors
