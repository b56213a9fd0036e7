"""Calibration: counts, thresholds and errors against plain forms, and its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stpp import distributed
from stpp.config import DataConfig
from stpp.dataset import index
from stpp.errors import UserError
from stpp.inference import calibration, views
from stpp.inference.calibration import BINS, FEW_PIXELS, NEVER, Calibration
from stpp.loading.native import native_batches

HERE = distributed.World(device=torch.device("cpu"))


class Stub:
    """Network of six classes from fixed convolutions, with different degrees of confidence."""

    num_classes, view_px = 6, None

    def __init__(self):
        self._weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images_NCHW, self._weight, stride=4)


def of_counts(counted, right) -> Calibration:
    return Calibration(classes=tuple("abcdef")[: len(counted)], all_CB=np.asarray(counted), images=1,
                       right_CB=np.asarray(right), tta="none", network="w", held_out="h")


def drawn(seed: int, classes: int = 3, pixels: int = 20_000) -> tuple[Calibration, list[np.ndarray]]:
    """Returns counts of random pixels, and the pixels: class, bin, correctness."""
    rng = np.random.default_rng(seed)
    predicted, bins = rng.integers(0, classes, pixels), rng.integers(0, BINS, pixels)
    right = rng.random(pixels) < (bins / BINS) ** rng.uniform(0.2, 3)
    counts = [np.zeros((classes, BINS), np.int64) for _ in range(2)]
    np.add.at(counts[0], (predicted, bins), 1)
    np.add.at(counts[1], (predicted[right], bins[right]), 1)
    return of_counts(*counts), [predicted, bins, right]


@pytest.mark.parametrize("tta", ["none", "flip"])
def test_counts_match_the_pixels(synthetic_index, tta):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)][:5]
    found = calibration.measure(Stub(), samples, HERE, DataConfig(threads=1), tta=tta, classes="abcdef",
                                network="w")
    counted, right = np.zeros((6, BINS), np.int64), np.zeros((6, BINS), np.int64)
    pixels = 0
    for batch in native_batches(samples, [[i] for i in range(5)], device="cpu", loader="auto", threads=1):
        sums = views.accumulate_views(Stub().logits, batch.images_NCHW, tta, 6)[0].double()
        truth = batch.labels_NHW[0].numpy()
        share = (sums.amax(0) / sums.sum(0)).numpy()
        mask = sums.argmax(0).numpy()
        pixels += (truth != 255).sum()
        for y, x in np.argwhere(truth != 255):
            place = (mask[y, x], min(int(share[y, x] * BINS), BINS - 1))
            counted[place] += 1
            right[place] += mask[y, x] == truth[y, x]
    assert found.all_CB.sum() == pixels == counted.sum()
    assert np.abs(found.all_CB - counted).sum() <= 0.002 * pixels  # float64 rounds some into the next bin
    assert np.array_equal(found.all_CB.sum(1), counted.sum(1))
    assert np.array_equal(found.right_CB.sum(1), right.sum(1)) and 0 < right.sum() < pixels


@given(st.integers(0, 10**6), st.floats(0.05, 0.99))
@settings(max_examples=40)
def test_proposal_is_the_least_confidence_with_the_precision(seed, wanted):
    found, (predicted, bins, right) = drawn(seed)
    for class_id in (None, 0, 2):
        ours = np.full(len(predicted), True) if class_id is None else predicted == class_id
        total, at, good = ours.sum(), bins[ours], right[ours]
        expected, best = None, (0.0, 0)
        for place in range(BINS):
            kept = at >= place
            if kept.sum() < max(1, total / 100):
                break
            best = max(best, (good[kept].mean(), -place))
            if good[kept].mean() >= wanted:
                expected = place
                break
        one = found.proposal(wanted, class_id)
        place = expected if expected is not None else -best[1]
        kept = at >= place
        assert (one.confidence, one.reached) == (place / BINS, expected is not None)
        assert one.coverage == pytest.approx(kept.mean())
        assert one.precision == pytest.approx(good[kept].mean())


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_calibration_error_matches_the_paper(seed):
    found, (predicted, bins, right) = drawn(seed)
    for class_id in (None, 1):
        ours = np.full(len(predicted), True) if class_id is None else predicted == class_id
        confidence = (bins[ours] + 0.5) / BINS
        expected = 0.0
        for number in range(15):
            inside = (confidence >= number / 15) & (confidence < (number + 1) / 15)
            if inside.any():
                expected += abs(right[ours][inside].mean() - confidence[inside].mean()) * inside.mean()
        assert found.error(class_id) == pytest.approx(expected, abs=1e-9)
        assert found.accuracy(class_id) == pytest.approx(right[ours].mean())


def test_perfectly_calibrated_network_has_no_error():
    counted = np.full((1, BINS), 2000)
    right = 2000 * (np.arange(BINS) + 0.5) / BINS
    assert of_counts(counted, right[None]).error() == pytest.approx(0, abs=1e-12)
    assert of_counts(counted, counted).error() == pytest.approx(0.5, abs=1e-3)


def test_thresholds_drop_unreachable_classes_and_use_the_common_one_for_rare_classes():
    counted, right = np.zeros((3, BINS), np.int64), np.zeros((3, BINS), np.int64)
    counted[0, 500:] = right[0, 500:] = 100
    right[0, 500:700] = 0  # correct from 0.7 on, nearly
    counted[1] = 2  # never correct
    counted[2, 900] = FEW_PIXELS - 1
    found = of_counts(counted, right)
    floors = found.floors(0.95)
    own, overall = found.proposal(0.95, 0), found.proposal(0.95)
    assert floors == (own.confidence, NEVER, overall.confidence) and overall.reached
    assert 0.68 < own.confidence <= 0.7
    assert not found.proposal(0.95, 1).reached and found.proposal(0.95, 2).few


def test_curve_decreases_in_coverage():
    found, _ = drawn(3)
    curve = found.curve(1)
    assert curve[0][:2] == (0.0, 1.0) and len(curve) == 100
    assert all(a[1] >= b[1] for a, b in zip(curve, curve[1:], strict=False))
    empty = np.zeros((1, BINS), np.int64)
    assert of_counts(empty, empty).curve() == [] and of_counts(empty, empty).error() is None


def test_written_calibration_reads_back(tmp_path):
    found, _ = drawn(4)
    path = tmp_path / "calibration.json"
    calibration.write(path, found, [0.5, 0.9])
    again = calibration.read(path)
    assert np.array_equal(again.all_CB, found.all_CB) and np.array_equal(again.right_CB, found.right_CB)
    assert (again.classes, again.tta, again.network, again.held_out) == (found.classes, "none", "w", "h")
    values = json.loads(path.read_text())
    assert values["all"]["expected_calibration_error"] == pytest.approx(found.error())
    assert values["classes"]["b"]["proposals"]["0.5"] == vars(found.proposal(0.5, 1))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}',
                                  '{"format": "stpp-calibration-1", "classes": {"a": {}}, "bins": {}}'])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = Path(tmp_path / "calibration.json")
    with pytest.raises(UserError, match="there is no calibration; `stpp calibrate"):
        calibration.read(path)
    path.write_text(text)
    with pytest.raises(UserError, match=r"calibration.json: not a calibration of this version"):
        calibration.read(path)


def test_images_without_a_label_are_refused():
    with pytest.raises(UserError, match="no pixel of the held-out images has a label"):
        calibration.measure(Stub(), [], HERE, DataConfig(threads=1), tta="none", classes="abcdef",
                            network="w")
