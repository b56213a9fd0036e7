"""Synthetic data set: its form, its determinism, and the agreement of masks and pictures."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from stpp.commands import synthetic
from stpp.dataset import index, splits
from stpp.errors import UserError
from stpp.images.palette import voc_colours

PLAIN = synthetic.Difficulty(
    hue_spread=0.0, any_colour=0.0, typical_texture=1.0, saturation=(0.9, 0.9), texture_strength=(0.0, 0.0),
    background_saturation=(0.0, 0.0), distractors=(0, 0), light=0.0, shadow=0.0, exposure=(1.0, 1.0),
    cast=0.0, blur_px=(0.0, 0.0), poor=0.0, noise=(0.0, 0.0),
)  # fmt: skip


def rng(number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[5, number]))


def test_set_passes_preparation_and_split(tmp_path):
    synthetic.generate(tmp_path / "data", seed=1, train=16, val=4)
    made = index.prepare(tmp_path / "data", tmp_path / "index", progress=False)
    assert made.layout == "voc" and made.classes == synthetic.CLASSES
    # Palette masks, so that the conversion runs.
    assert made.counts == {"images": 20, "masks": 20, "converted": 20}
    sizes = {(entry.width, entry.height) for entry in made.entries.values()}
    low, high = synthetic.Difficulty().side_px
    assert len(sizes) > 10 and all(low <= side <= high for size in sizes for side in size)
    splits.make_split(made, tmp_path / "split", fraction="1/8")
    counts = {
        name: len((tmp_path / "split" / f"{name}.txt").read_text().splitlines())
        for name in ("labeled", "unlabeled", "val")
    }
    assert counts == {"labeled": 2, "unlabeled": 14, "val": 4}
    for entry in made.entries.values():
        stored = np.asarray(Image.open(made.root / entry.mask))
        np.testing.assert_array_equal(np.asarray(Image.open(made.sample(entry.image).mask)), stored)


def test_equal_seeds_give_equal_pictures(tmp_path):
    for name, seed, train in (("a", 4, 3), ("b", 4, 5), ("c", 5, 3)):
        synthetic.generate(tmp_path / name, seed=seed, train=train, val=1)
    a, b, c = (sorted((tmp_path / name / "JPEGImages").iterdir()) for name in "abc")
    assert [x.read_bytes() for x in a] == [x.read_bytes() for x in b[:4]]
    assert all(x.read_bytes() != y.read_bytes() for x, y in zip(a, c, strict=True))


def test_masks_match_the_shapes():
    """Without nuisances, each class's pixels have its hue, the ground has none, and only edges lie
    between."""
    wrong = total = 0
    for number in range(20):
        pixels, mask = synthetic.draw_picture(rng(number), PLAIN)
        assert pixels.dtype == mask.dtype == np.uint8 and pixels.shape == (*mask.shape, 3)
        hue, saturation, _ = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV")).astype(int), -1,
                                         0)
        wrong += int(((saturation > 128) != (mask > 0)).sum())
        total += mask.size
        for label, name in enumerate(synthetic.CLASSES[1:], 1):
            inside = hue[(mask == label) & (saturation > 200)]
            distance = np.abs((inside - 255 * synthetic._LOOKS[name][0] + 128) % 256 - 128)
            assert inside.size == 0 or np.median(distance) <= 3
    assert wrong < 0.01 * total


def test_shares_of_the_classes():
    pixels = sum(
        np.bincount(synthetic.draw_picture(rng(i), synthetic.Difficulty())[1].ravel(), minlength=6)
        for i in range(60)
    )
    shares = pixels / pixels.sum()
    assert 0.5 < shares[0] < 0.85 and (shares[1:] > 0.015).all()


def test_the_palette_is_vocs():
    colours = voc_colours(np.arange(256))
    assert colours[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_nothing_is_overwritten(tmp_path):
    synthetic.generate(tmp_path, train=1, val=0)
    with pytest.raises(UserError, match="already contains a data set"):
        synthetic.generate(tmp_path, train=1, val=0)
    with pytest.raises(ValueError, match="train, val"):
        synthetic.generate(tmp_path / "other", train=0)


def test_difficulty_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        synthetic.Difficulty().noise = (0, 0)
