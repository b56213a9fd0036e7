"""Preference for images and crops with rare classes: the contents of masks, the filling of places, the
position of crops."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stpp import distributed
from stpp.config import AugmentConfig, RareConfig
from stpp.dataset import index
from stpp.loading import rare_images
from stpp.loading.augment import draw
from stpp.loading.decode import mask_of
from stpp.loading.sample import Preference, Sample, Stream
from stpp.loading.sampler import StepSampler, drawn_classes, epoch_order, preferred, stage_samplers

HERE = distributed.World(device=torch.device("cpu"))
KEY = {"seed": 5, "stage": 2, "epoch": 3, "number": 0}


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40),
                     elements=st.sampled_from([0, 1, 2, 5, 255])))
def test_mask_gives_its_classes_and_some_of_their_pixels(mask):
    found = rare_images.content(mask, 6)
    assert found.pixels_C.tolist() == [int((mask == i).sum()) for i in range(6)]
    assert found.spots.keys() == {i for i in range(6) if (mask == i).any()}
    for class_id, spots in found.spots.items():
        assert len(spots) == min(rare_images.SPOTS, int((mask == class_id).sum()))
        places = np.floor(spots.astype(np.float64) * mask.shape).astype(int)
        assert all(mask[y, x] == class_id for y, x in places)
        assert len({tuple(place) for place in places.tolist()}) == len(spots)


def made(share: float = 0.5, tries: int = 10) -> Preference:
    """Five images: class 1 is only in image 3, class 2 nowhere, class 0 in all."""
    members = (np.arange(5), np.array([3]), np.array([], dtype=np.int64))
    spots = tuple({0: np.array([[0.1, 0.1]], np.float32)}
                  | ({1: np.array([[0.9, 0.9]], np.float32)} if i == 3 else {}) for i in range(5))
    return Preference(share=share, chances_C=np.array([0.25, 0.75, 0.0]), members=members, spots=spots,
                      crop_tries=tries)


def test_places_are_filled_by_class_chances():
    n = 40_000
    order = epoch_order(n, **KEY) % 5
    found = preferred(made(), np.arange(n), order, **KEY)
    classes, _ = drawn_classes(made(), np.arange(n), **KEY)
    shares = [(classes == i).mean() for i in (-1, 0, 1, 2)]
    assert shares == pytest.approx([0.5, 0.125, 0.375, 0], abs=0.01)
    assert np.array_equal(found[classes == -1], order[classes == -1])
    assert (found[classes == 1] == 3).all()
    of_all = np.bincount(found[classes == 0], minlength=5) / (classes == 0).sum()
    assert of_all == pytest.approx(0.2, abs=0.02)


def test_absent_last_class_has_no_chance():
    ends = dataclasses.replace(made(1.0), chances_C=np.array([1 / 3, 2 / 3 - 1e-9, 0.0]))
    assert drawn_classes(ends, np.arange(100_000), **KEY)[0].max() == 1


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (4, 2)])
def test_places_do_not_depend_on_ranks_or_resume(world, accumulate):
    whole = StepSampler(5, 8, 5, 2, longest=64, preference=made())
    alone = {micro.step: micro.indices for micro in whole.micro_batches(0, 20)}
    plain = {micro.step: micro.indices for micro in StepSampler(5, 8, 5, 2, longest=64).micro_batches(0, 20)}
    assert any(not np.array_equal(alone[step], plain[step]) for step in alone)
    for step in (0, 7, 19):
        parts = [micro for rank in range(world)
                 for micro in whole.micro_batches(step, step + 1, rank=rank, world=world,
                                                  accumulate=accumulate)]
        assert np.concatenate([micro.indices for micro in parts]).tolist() == alone[step].tolist()


def stream(preference: Preference | None) -> Stream:
    samples = [Sample(key=str(i), image=f"{i}.jpg", mask=f"{i}.png", width=600, height=400) for i in range(5)]
    return Stream(samples=samples, preference=preference)


AUGMENT = AugmentConfig(crop_px=100, long_side=(500, 700))


def crops(preference: Preference | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether the crop of every place of class 1 shows it, and the classes of all places."""
    positions = np.arange(2000)
    indices = preferred(made(), positions, epoch_order(2000, **KEY) % 5, **KEY)
    key = {name: KEY[name] for name in ("seed", "stage", "epoch")}
    geometry = draw(stream(preference), indices, positions, augment=AUGMENT, **key).geometry
    y, x = (np.floor(np.float32(0.9).astype(float) * side) for side in (geometry.resize_h, geometry.resize_w))
    inside = ((y >= geometry.crop_y) & (y < geometry.crop_y + 100) & (x >= geometry.crop_x)
              & (x < geometry.crop_x + 100))
    return inside, drawn_classes(made(), positions, **KEY)[0]


def test_crops_are_drawn_again_until_they_show_the_class():
    first, classes = crops(None)
    chance = first[classes == 1].mean()
    again, _ = crops(made(tries=8))
    assert 0.005 < chance < 0.3
    assert again[classes == 1].mean() == pytest.approx(1 - (1 - chance) ** 8, abs=0.06)
    once, _ = crops(made(tries=1))
    assert np.array_equal(once, first)


def test_other_places_and_other_numbers_are_unchanged():
    positions, indices = np.arange(300), np.full(300, 3)
    key = {name: KEY[name] for name in ("seed", "stage", "epoch")}
    plain, ours = (draw(stream(one), indices, positions, augment=AUGMENT, **key) for one in (None, made()))
    classes, _ = drawn_classes(made(), positions, **KEY)
    for field in ("resize_h", "resize_w", "crop_y", "crop_x"):
        same = getattr(plain.geometry, field) == getattr(ours.geometry, field)
        assert same[classes == -1].all()
    assert (plain.geometry.crop_y != ours.geometry.crop_y)[classes == 1].mean() > 0.5
    assert np.array_equal(plain.geometry.flip, ours.geometry.flip)
    for name in ("box", "hue", "noise_offset"):
        assert np.array_equal(getattr(plain.views[0], name), getattr(ours.views[0], name))
    half = draw(stream(made()), indices[100:200], positions[100:200], augment=AUGMENT, **key).geometry
    assert np.array_equal(half.crop_y, ours.geometry.crop_y[100:200])  # of the position, not of the batch


def test_preference_uses_the_masks_of_its_list(synthetic_index):
    known = index.load(synthetic_index)
    samples = [known.sample(image) for image in sorted(known.entries)][:7] * 2
    found = rare_images.preference(samples, 6, RareConfig(sampling=0.25, crop_tries=3), HERE, 2)
    counts = np.stack([np.bincount(mask_of(sample).ravel(), minlength=256)[:6] for sample in samples])
    chances = np.array([1 / math.sqrt(n) if n else 0 for n in counts.sum(0).tolist()])
    assert found.chances_C == pytest.approx(chances / chances.sum())
    assert [one.tolist() for one in found.members] == [np.flatnonzero(column).tolist() for column in counts.T]
    assert (found.share, found.crop_tries) == (0.25, 3)
    assert rare_images.preference(samples, 6, RareConfig(), HERE, 1) is None


def test_samplers_of_a_stage_take_the_preference_of_their_stream():
    ours = stage_samplers([stream(made()), dataclasses.replace(stream(None), number=1)], 4, seed=0, stage=1)
    assert [sampler.preference is None for sampler in ours] == [False, True]
