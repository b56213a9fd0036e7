"""View size of whole images: against a plain form, and the same in every command."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engine_cases as cases
import stpp
from cli_cases import ended
from run_cases import TINY
from stpp.config import Config
from stpp.dataset import index
from stpp.errors import UserError
from stpp.images.masks import read_index_mask
from stpp.inference import views
from stpp.models.trained import load_network
from stpp.settings import from_values

VIEW_PX, CLASSES = 64, 6


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return cases.seeing_all_classes()


@pytest.fixture(scope="module")
def best(network, tmp_path_factory, synthetic_index) -> Path:
    return cases.saved(tmp_path_factory.mktemp("checkpoint") / "best.pt", network,
                       index.load(synthetic_index).classes, view_px=VIEW_PX)


@pytest.fixture(scope="module")
def photographs(synthetic, tmp_path_factory) -> Path:
    """Larger than the view size, upright and lying."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, path in enumerate(sorted((synthetic / "JPEGImages").glob("*.jpg"))[:4]):
        with Image.open(path) as image:
            image.resize([(150, 113), (90, 131), (64, 64), (41, 30)][i]).save(folder / f"{i}.png")
    return folder


def plain(network, images_NCHW, mode, view_px) -> torch.Tensor:
    """Computes probabilities at the images' size, in plain PyTorch."""
    height, width = images_NCHW.shape[-2:]
    scale = view_px / max(height, width)
    seen = F.interpolate(images_NCHW, (round(height * scale), round(width * scale)), mode="bilinear",
                         antialias=True)
    total = 0
    for factor in views.VIEWS[mode][0]:
        size = [max(1, int(side * factor)) for side in seen.shape[-2:]]
        view = F.interpolate(seen, size, mode="bilinear", align_corners=True)
        for flip in (False, True)[: 1 + views.VIEWS[mode][1]]:
            logits = network(view.flip(3) if flip else view)
            chances = F.interpolate(logits, size, mode="bilinear", align_corners=True).softmax(1)
            chances = F.interpolate(chances, seen.shape[-2:], mode="bilinear", align_corners=True)
            total = total + (chances.flip(3) if flip else chances)
    return F.interpolate(total, (height, width), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("mode", views.VIEWS)
@pytest.mark.parametrize("size", [(113, 150), (131, 90), (64, 64), (30, 41)])
def test_masks_have_the_image_size_and_match_the_plain_form(network, mode, size):
    images = cases.images(2, *size)
    predictor = SimpleNamespace(logits=network, num_classes=CLASSES, view_px=VIEW_PX)
    with torch.no_grad():
        truth, masks = plain(network, images, mode, VIEW_PX), views.masks(predictor, images, mode)
    assert masks.shape == (2, *size)
    decided = truth.topk(2, 1).values.diff(dim=1)[:, 0].abs() > 1e-3 * len(views.VIEWS[mode][0])
    assert decided.float().mean() > 0.8 and torch.equal(masks[decided], truth.argmax(1).byte()[decided])


def test_image_of_the_view_size_is_unchanged(network):
    images = cases.images(2, 48, VIEW_PX)
    assert views.resize_to_view(images, VIEW_PX) is images and views.resize_to_view(images, None) is images
    with torch.no_grad():
        own, asked = (views.masks(SimpleNamespace(logits=network, num_classes=CLASSES, view_px=side), images,
                                  "none") for side in (None, VIEW_PX))
    assert torch.equal(own, asked)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 2000))
@settings(max_examples=200)
def test_longer_side_equals_the_view_size(height, width, view_px):
    found = views.view_size(height, width, view_px)
    assert max(found) == view_px and min(found) >= 1
    assert abs(found[0] * width - found[1] * height) <= max(height, width) or 1 in found


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_every_command_uses_the_view_size_of_the_checkpoint(network, best, photographs, tmp_path, capsys,
                                                            tta):
    where = ("--device", "cpu", "--precision", "fp32", "--tta", tta)
    code, *_ = ended(capsys, "predict", str(photographs), "--checkpoint", str(best), "--out",
                     str(tmp_path / "predicted"), *where)
    assert code == 0
    code, *_ = ended(capsys, "label", "--source", str(photographs), "--teacher", str(best), "--out",
                     str(tmp_path / "labelled"), "--loader", "reference", *where)
    assert code == 0
    loaded = stpp.load(best, device="cpu", precision="fp32", tta=tta)
    other = stpp.load(best, device="cpu", precision="fp32", tta=tta, view_px=96)
    differ = 0
    for path in sorted(photographs.iterdir()):
        masks = [read_index_mask(tmp_path / folder / "masks" / path.name)
                 for folder in ("predicted", "labelled")]
        with Image.open(path) as image:
            assert masks[0].shape == image.size[::-1]
        assert all(np.array_equal(mask, loaded.predict(path)) for mask in masks)
        differ += not np.array_equal(masks[0], other.predict(path))
    assert differ, "the size changes nothing, so this test shows nothing"
    # a labelling cannot be resumed at another size
    code, _, said = ended(capsys, "label", "--source", str(photographs), "--teacher", str(best), "--out",
                          str(tmp_path / "labelled"), "--loader", "reference", "--view-px", "96", *where)
    assert code == 2 and "teacher" in said


@pytest.mark.parametrize("floor", ["0", "0.6"])
def test_rows_count_mask_pixels(best, photographs, tmp_path, capsys, floor):
    from stpp.label import confidence_map, rows

    out = tmp_path / "out"
    code, *_ = ended(capsys, "label", "--source", str(photographs), "--teacher", str(best), "--out", str(out),
                     "--loader", "reference", "--device", "cpu", "--min-confidence", floor)
    assert code == 0
    found = list(rows.read_parts(out, "labels"))
    ignored = 0.0
    for row in found:
        mask = read_index_mask(out / "masks" / f"{row['key']}.png")
        assert row["class_pixels"] == [(mask == c).sum() for c in range(CLASSES)]
        assert row["ignored_fraction"] == pytest.approx((mask == 255).mean(), abs=1e-6)
        assert confidence_map.read(row["confidence_map"], *mask.shape) is not None
        ignored += row["ignored_fraction"]
    assert len(found) == 4 and (ignored > 0) == (floor != "0")


def test_view_size_flag_applies_to_published_networks(network, best, photographs, tmp_path):
    torch.save(network.state_dict(), tmp_path / "published.pth")
    told = stpp.load(tmp_path / "published.pth", device="cpu", precision="fp32", output_stride=16,
                     view_px=VIEW_PX)
    assert np.array_equal(told.predict(photographs / "0.png"),
                          stpp.load(best, device="cpu", precision="fp32").predict(photographs / "0.png"))


@pytest.mark.parametrize("value", [0, -5, 15, 40000])
def test_impossible_view_size_is_named(best, photographs, tmp_path, capsys, value):
    with pytest.raises(UserError, match=f"--data.view-px is {value}: it must be from 16 to 32768"):
        from_values(Config, {"data": {"view_px": value}})
    code, _, said = ended(capsys, "predict", str(photographs), "--checkpoint", str(best), "--out",
                          str(tmp_path / "x"), "--view-px", str(value))
    assert code == 2 and f"--view-px is {value}" in said and len(said.strip().splitlines()) == 1


def test_checkpoint_with_an_invalid_view_size_is_refused(network, tmp_path):
    for told in ("64", 0, 1.5, True):
        cases.saved(tmp_path / "odd.pt", network, map(str, range(CLASSES)), view_px=told)
        with pytest.raises(UserError, match="view.px is"):
            load_network(tmp_path / "odd.pt")


@pytest.mark.slow
def test_run_scores_labels_and_keeps_the_view_size(synthetic, tmp_path, capsys):
    """Every stage of ST++; its last score is that of `stpp evaluate`, which reads the size from the
    checkpoint."""
    (tmp_path / "tiny.toml").write_text(TINY)
    run = tmp_path / "run"
    code, _, said = ended(capsys, "train", "--recipe", str(tmp_path / "tiny.toml"), "--data.root",
                          str(synthetic), "--out", str(run), "--device", "cpu", "--train.precision", "fp32",
                          "--data.view-px", "48")
    assert code == 0, said
    best = run / "stages" / "6-retrain" / "best.pt"
    assert load_network(best).architecture["view_px"] == 48
    code, *_ = ended(capsys, "evaluate", "--checkpoint", str(best), "--device", "cpu", "--precision", "fp32",
                     "--out", str(tmp_path / "scores.json"))
    last = json.loads((run / "results.json").read_text())["stages"][-1]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert code == 0 and scores["miou"] == pytest.approx(last["miou"])
    known = index.load(run / "index")
    masks = list((run / "stages" / "3-label" / "masks").rglob("*.png"))
    sizes = {entry.key: (entry.height, entry.width) for entry in known.entries.values()}
    folder = run / "stages" / "3-label" / "masks"
    assert masks and all(read_index_mask(path).shape == sizes[str(path.relative_to(folder).with_suffix(""))]
                         for path in masks)
