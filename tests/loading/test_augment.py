"""Drawn numbers: their distributions, and their independence of other samples."""

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest

from stpp.config import AugmentConfig
from stpp.loading import augment
from stpp.loading.augment import draw, noise_image
from stpp.loading.sample import Sample, Stream

KEY = {"seed": 3, "stage": 4, "epoch": 5}
SETTINGS = {**KEY, "crop_px": 320, "long_side": (200, 800)}
N = 40_000


def samples_of(n: int, *, strong: bool = True, size: tuple[int, int] = (360, 480)) -> list[Sample]:
    return [Sample(key=str(i), image="i", height=size[0], width=size[1], strong=strong) for i in range(n)]


def views_of(samples: list[Sample], positions: np.ndarray, *, seed: int, stage: int, epoch: int,
             views=("sample",), box="erase", number: int = 0, **settings) -> list[SimpleNamespace]:
    """Returns the numbers of each view, including the shared geometry."""
    stream = Stream(samples=samples, views=views, box=box, masked=False, number=number)
    found = draw(stream, np.arange(len(samples)), positions, augment=AugmentConfig(**settings), seed=seed,
                 stage=stage, epoch=epoch)
    shared = arrays_of(found.geometry) | {"shown": found.geometry.shown}
    return [SimpleNamespace(**shared, **arrays_of(view)) for view in found.views]


def arrays_of(record) -> dict:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)
            if field.name != "crop_px"}


def numbers(samples: list[Sample], positions: np.ndarray, **settings) -> SimpleNamespace:
    (found,) = views_of(samples, positions, **settings)
    return found


@pytest.fixture(scope="module")
def drawn() -> SimpleNamespace:
    return numbers(samples_of(N), np.arange(N), **SETTINGS)


def rows(params: SimpleNamespace, chosen: list[int]) -> list:
    return [values[chosen].tolist() for values in vars(params).values()]


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    """Kolmogorov-Smirnov at about 1e-4, against U(low, high)."""
    values = np.sort((values - low) / (high - low))
    assert values[0] >= 0 and values[-1] <= 1, (values[0], values[-1])
    distance = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    return distance < 2.2 / np.sqrt(len(values))


def rate_is(flags: np.ndarray, rate: float) -> bool:
    return abs(flags.mean() - rate) < 4.5 * np.sqrt(rate * (1 - rate) / len(flags))


def test_a_samples_numbers_do_not_depend_on_its_batch(drawn):
    chosen = [7, 3, 4, 5, 39_999, 0, 123]
    samples = samples_of(len(chosen))
    assert rows(numbers(samples, np.array(chosen), **SETTINGS),
                list(range(len(chosen)))) == rows(drawn, chosen)
    assert rows(numbers(samples[:1], np.array([123]), **SETTINGS), [0]) == rows(drawn, [123])


def test_every_part_of_the_key_matters():
    base = rows(numbers(samples_of(4), np.arange(4), **SETTINGS), [0, 1, 2, 3])
    for name in KEY:
        assert rows(numbers(samples_of(4), np.arange(4), **{**SETTINGS, name: 9}), [0, 1, 2, 3]) != base
    assert rows(numbers(samples_of(4), np.arange(4) + 1, **SETTINGS), [0, 1, 2]) == rows(
        numbers(samples_of(4), np.arange(4), **SETTINGS), [1, 2, 3])  # fmt: skip


def test_weak_distributions(drawn):
    long_side = np.maximum(drawn.resize_h, drawn.resize_w)
    assert long_side.min() == 200 and long_side.max() == 800 and is_uniform(long_side, 199.5, 800.5)
    assert (drawn.resize_h == np.floor(360 * drawn.resize_w / 480 + 0.5)).all()
    assert rate_is(drawn.flip, 0.5)
    for position, size in ((drawn.crop_y, drawn.resize_h), (drawn.crop_x, drawn.resize_w)):
        spare = np.maximum(size - 320, 0)
        assert (position >= 0).all() and (position <= spare).all()
        wide = spare > 200
        inside = (position[wide] + 0.5) / (spare[wide] + 1)
        assert is_uniform(inside, 0,
                          1) and (position[wide] == 0).any() and (position[wide] == spare[wide]).any()


def test_strong_distributions(drawn):
    assert rate_is(drawn.jitter, 0.8) and rate_is(drawn.gray, 0.2) and rate_is(drawn.blur_sigma > 0, 0.5)
    assert rate_is(drawn.box[:, 2] > 0, 0.5)
    jitter = drawn.jitter
    for values, low, high in ((drawn.brightness, 0.5, 1.5), (drawn.contrast, 0.5, 1.5),
                              (drawn.saturation, 0.5, 1.5), (drawn.hue, -0.25, 0.25)):  # fmt: skip
        assert is_uniform(values[jitter], low, high)
    assert is_uniform(drawn.blur_sigma[drawn.blur_sigma > 0], 0.1, 2.0)
    orders, counts = np.unique(drawn.jitter_order[jitter], axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == np.arange(4)).all()
    assert np.abs(counts / counts.sum() * 24 - 1).max() < 0.15
    for axis in (0, 1):
        assert is_uniform(drawn.noise_offset[:, axis], -0.5, 320.5)


def test_draws_are_independent(drawn):
    flags = [drawn.flip, drawn.jitter, drawn.gray, drawn.blur_sigma > 0, drawn.box[:, 2] > 0]
    columns = np.stack([drawn.resize_w, *flags, *drawn.noise_offset.T]).astype(float)
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(N)
    jittered = np.stack([drawn.brightness, drawn.contrast, drawn.saturation, drawn.hue])[:, drawn.jitter]
    assert np.abs(np.corrcoef(jittered) - np.eye(4)).max() < 5 / np.sqrt(N)
    # Neighbouring positions share nothing.
    assert abs(np.corrcoef(drawn.resize_w[:-1], drawn.resize_w[1:])[0, 1]) < 4.5 / np.sqrt(N)


def test_weak_samples_get_no_strong_augmentation():
    params = numbers(samples_of(500, strong=False), np.arange(500), **SETTINGS)
    strong = numbers(samples_of(500), np.arange(500), **SETTINGS)
    assert not (params.jitter | params.gray).any()
    assert not params.blur_sigma.any() and not params.box.any() and not params.hue.any()
    assert (params.brightness == 1).all() and (params.contrast == 1).all() and (params.saturation == 1).all()
    assert (params.crop_x == strong.crop_x).all() and (params.flip == strong.flip).all(), (
        "the weak part must not change"
    )


def redrawn_box(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """The rule as described: draws all four again until the box fits."""
    while True:
        area, ratio = rng.uniform(0.02, 0.4) * side * side, rng.uniform(0.3, 1 / 0.3)
        h, w = int(np.sqrt(area * ratio)), int(np.sqrt(area / ratio))
        y, x = rng.integers(0, side), rng.integers(0, side)
        if y + h <= side and x + w <= side:
            return y, x, h, w


def assert_same_distribution(boxes, expected):
    """Asserts that sides, places and areas of two sets of boxes pass the test of Kolmogorov and Smirnov."""
    areas = (boxes[:, 2:3] * boxes[:, 3:], expected[:, 2:3] * expected[:, 3:])
    for ours, theirs in ((boxes, expected), areas):
        for column in range(ours.shape[1]):
            a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
            grid = np.unique(np.concatenate([a, b]))
            distance = np.abs(
                np.searchsorted(a, grid, "right") / len(a) - np.searchsorted(b, grid, "right") / len(b)
            )
            assert distance.max() < 2.2 * np.sqrt(1 / len(a) + 1 / len(b)), column


def test_cutout_boxes_fit_and_follow_the_redraw_rule(drawn):
    boxes = drawn.box[drawn.box[:, 2] > 0]
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 320).all()
    rng = np.random.default_rng(0)
    told = np.array([redrawn_box(rng, 320) for _ in range(20_000)])
    assert_same_distribution(boxes, told)
    # Small boxes fit more often, so they are more frequent than in the distribution that is drawn from.
    assert (boxes[:, 2] * boxes[:, 3] / 320**2).mean() < 0.19


def test_boxes_that_need_many_attempts_are_found(monkeypatch):
    """With two attempts per block, most boxes need further blocks; they fit and depend only on position."""
    monkeypatch.setattr(augment, "_BLOCK", 24)
    params = numbers(samples_of(2000), np.arange(2000), **SETTINGS)
    has_box = params.box[:, 2] > 0
    assert rate_is(has_box, 0.5) and (params.box[:, :2] + params.box[:, 2:] <= 320).all()
    alone = numbers(samples_of(3), np.array([50, 1999, 7]), **SETTINGS)
    assert (alone.box == params.box[[50, 1999, 7]]).all()
    assert len(np.unique(params.box[has_box], axis=0)) > 950, "boxes must not repeat"


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (7, 5), (333, 500), (500, 333)])
def test_sizes_after_resizing(size):
    params = numbers(samples_of(300, size=size), np.arange(300),
                     **{**SETTINGS, "long_side": (3, 90), "crop_px": 40})
    for h, w in zip(params.resize_h.tolist(), params.resize_w.tolist(), strict=True):
        long_side = max(h, w)
        assert 3 <= long_side <= 90
        expected = [max(int(s * long_side / max(size) + 0.5), 1) for s in size]
        assert [h, w] == expected


def test_shown_pixels_exclude_padding(drawn):
    small = numbers(samples_of(2000), np.arange(2000), **{**SETTINGS, "crop_px": 500})
    for params, side in ((drawn, 320), (small, 500)):
        y, x, height, width = params.shown.T
        assert (y == 0).all() and (height == np.minimum(params.resize_h - params.crop_y, side)).all()
        assert (width == np.minimum(params.resize_w - params.crop_x, side)).all()
        assert (x == np.where(params.flip, side - width,
                              0)).all() and (height >= 1).all() and (width >= 1).all()
    assert (small.shown[:, 3] < 500).any() and (small.shown[:, 1] > 0).any()


def test_views_share_only_their_geometry():
    three = views_of(samples_of(4000), np.arange(4000), **SETTINGS, views=("weak", "strong", "strong"),
                     box="paste")
    one = numbers(samples_of(4000, strong=True), np.arange(4000), **SETTINGS)
    weak, first, second = three
    for name in ("resize_h", "resize_w", "crop_y", "crop_x", "flip", "shown"):
        assert all((getattr(view, name) == getattr(one, name)).all() for view in three), name
    assert not weak.jitter.any() and not weak.gray.any() and not weak.blur_sigma.any() and not weak.box.any()
    for values in ("brightness", "hue", "blur_sigma"):
        a, b = (getattr(view, values)[first.jitter & second.jitter] for view in (first, second))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert (first.box != second.box).any(1).mean() > 0.6
    assert abs(np.corrcoef(first.flip, first.jitter)[0, 1]) < 0.08


def test_streams_share_nothing():
    numbered = [numbers(samples_of(2000), np.arange(2000), **SETTINGS, number=number) for number in (0, 1, 2)]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(numbered[a].resize_w, numbered[b].resize_w)[0, 1]) < 0.1
        assert abs(np.corrcoef(numbered[a].hue, numbered[b].hue)[0, 1]) < 0.1


def test_first_view_equals_a_single_view():
    """ST and ST++ keep their numbers, whatever further views are drawn."""
    one = numbers(samples_of(300), np.arange(300), **SETTINGS)
    first, _ = views_of(samples_of(300), np.arange(300), **SETTINGS, views=("strong", "strong"))
    assert rows(first, list(range(300))) == rows(one, list(range(300)))


def pasted_box(rng: np.random.Generator, side: int) -> tuple[int, int, int, int]:
    """UniMatch's rule: draws the area once, then shape and place until the box fits."""
    area = rng.uniform(0.02, 0.4) * side * side
    while True:
        ratio = rng.uniform(0.3, 1 / 0.3)
        w, h = int(np.sqrt(area / ratio)), int(np.sqrt(area * ratio))
        x, y = rng.integers(0, side), rng.integers(0, side)
        if x + w <= side and y + h <= side:
            return y, x, h, w


def test_pasted_boxes_keep_their_area():
    (view,) = views_of(samples_of(20_000), np.arange(20_000), **SETTINGS, views=("strong",), box="paste")
    boxes = view.box[view.box[:, 2] > 0]
    assert rate_is(view.box[:, 2] > 0, 0.5) and (boxes[:, :2] + boxes[:, 2:] <= 320).all()
    rng = np.random.default_rng(1)
    told = np.array([pasted_box(rng, 320) for _ in range(10_000)])
    assert_same_distribution(boxes, told)
    # The mean area is the drawn one, not that of boxes that fit easily.
    assert abs((boxes[:, 2] * boxes[:, 3] / 320**2).mean() - 0.21) < 0.01


def test_pasted_boxes_that_need_many_attempts_keep_their_area(monkeypatch):
    monkeypatch.setattr(augment, "_BLOCK", 24)
    (view,) = views_of(samples_of(4000), np.arange(4000), **SETTINGS, views=("strong",), box="paste")
    boxes = view.box[view.box[:, 2] > 0]
    assert abs((boxes[:, 2] * boxes[:, 3] / 320**2).mean() - 0.21) < 0.015


def test_long_sides_in_percent_are_relative_to_each_image():
    samples = [*samples_of(500, size=(100, 40)), *samples_of(500, size=(60, 300))]
    params = numbers(samples, np.arange(1000), **{**SETTINGS, "long_side": (50, 200)},
                     long_side_unit="percent")
    longest = np.maximum(params.resize_h, params.resize_w)
    assert longest[:500].min() in range(50, 54) and longest[:500].max() in range(196, 201)
    assert longest[500:].min() in range(150, 156) and longest[500:].max() in range(590, 601)


def test_strength_is_configurable():
    soft = numbers(samples_of(5000), np.arange(5000), **SETTINGS, jitter_p=0.5, jitter=(0.75, 1.25), hue=0.05,
                   gray_p=0.0, blur_p=1.0, blur_sigma=(0.5, 0.7), box_p=0.25, box_area=(0.1, 0.2),
                   box_aspect=(0.9, 1.1))
    assert (
        rate_is(soft.jitter, 0.5)
        and not soft.gray.any()
        and (soft.blur_sigma >= 0.5).all()
        and (soft.blur_sigma <= 0.7).all()
    )
    assert is_uniform(soft.contrast[soft.jitter], 0.75,
                      1.25) and is_uniform(soft.hue[soft.jitter], -0.05, 0.05)
    boxes = soft.box[soft.box[:, 2] > 0]
    assert rate_is(soft.box[:, 2] > 0, 0.25) and (boxes[:, 2] * boxes[:, 3] <= 0.2 * 320**2).all()
    assert (np.abs(boxes[:, 2] / boxes[:, 3] - 1) < 0.13).all()


def test_noise_is_fixed_and_uniform():
    noise = noise_image(300)
    assert noise.shape == (300, 300, 3) and noise.dtype == np.uint8 and (noise == noise_image(300)).all()
    counts = np.bincount(noise.ravel(), minlength=256)
    assert ((counts - noise.size / 256) ** 2 / (noise.size / 256)).sum() < 256 + 6 * np.sqrt(512)


@pytest.mark.parametrize("change",
                         [{"crop_px": 0}, {"long_side": (5, 4)}, {"long_side": (0, 4)}, {"seed": -1}])
def test_impossible_arguments_are_refused(change):
    with pytest.raises(ValueError):
        numbers(samples_of(2), np.arange(2), **{**SETTINGS, **change})
    with pytest.raises(ValueError):
        numbers(samples_of(2), np.arange(3), **SETTINGS)


@pytest.mark.parametrize("change",
                         [{"jitter_p": 1.5}, {"hue": 0.6}, {"jitter": (1.5, 0.5)}, {"box_area": (0.1, 1.0)},
                                    {"box_aspect": (4.0, 5.0)}])
def test_impossible_strengths_are_refused(change):
    with pytest.raises(ValueError):
        AugmentConfig(**change)


def test_samples_without_mask_need_streams_without_masks():
    with pytest.raises(ValueError, match="has no mask"):
        Stream(samples=samples_of(1))
    Stream(samples=samples_of(1), masked=False)


def test_drawing_is_cheap():
    """Runs on the main thread. The target is 60 us a sample; five times that fails, for busy machines."""
    samples, positions = samples_of(16), np.arange(16)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        numbers(samples, positions, **SETTINGS)
        times.append(time.perf_counter() - start)
    assert min(times) / 16 < 300e-6
