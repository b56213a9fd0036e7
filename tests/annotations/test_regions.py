"""Outlines, run lengths and bitmaps: the pixels that they cover, and the shapes reported as doubtful."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shape_cases import SQUARE, exact, outlines, square
from stpp.annotations import runs
from stpp.annotations.regions import LONGEST_PX, Bitmap, Outline, Runs, ring

H, W = 48, 64


def painted(region, height=H, width=W) -> np.ndarray:
    whole = np.zeros((height, width), bool)
    patch = region.patch(height, width)
    tall, wide = patch.pixels.shape
    whole[patch.y : patch.y + tall, patch.x : patch.x + wide] |= patch.pixels
    return whole


@given(outlines(W, H))
def test_outlines_match_an_exact_rasteriser(points):
    inside, distance = exact(points, H, W)
    found = painted(Outline((points,)))
    assert not ((found != inside) & (distance > 1.0)).any()


@given(st.lists(outlines(W, H), min_size=1, max_size=3), st.tuples(st.floats(-9, 9), st.floats(-9, 9)))
def test_filling_a_part_equals_filling_the_whole(rings, shift):
    """Fills only the part that an outline lies in, also if it leaves the image."""
    rings = [one + shift for one in rings]
    whole = coco_mask.decode(
        coco_mask.merge(coco_mask.frPyObjects([one.ravel().tolist() for one in rings], H, W))
    )
    assert (painted(Outline(tuple(rings))) == whole.astype(bool)).all()


@given(outlines(W, H))
def test_simple_outlines_are_not_doubtful(points):
    assert Outline((points,)).doubt(H, W) is None


@given(st.floats(8, 20), st.floats(8, 20), st.floats(2, 20), st.floats(2, 20))
def test_self_crossing_outlines_are_doubtful(wide, tall, x, y):
    bow = ring([x, y, x + wide, y + tall, x + wide, y, x, y + tall])
    assert "crosses itself" in Outline((bow,)).doubt(H, W)
    twice = np.concatenate([ring([x, y, x + wide, y, x + wide, y + tall, x, y + tall])] * 2)
    assert "crosses itself" in Outline((twice + np.linspace(0, 0.1, 8)[:, None],)).doubt(H, W)


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ([1, 1, 5, 5], "2 distinct points"),
        ([4, 4] * 5, "1 distinct point;"),
        ([1, 1, 5, 5, 1, 1], "2 distinct"),
    ],
)
def test_outlines_without_an_area_are_refused(points, says):
    with pytest.raises(ValueError, match=says):
        Outline((ring(points),)).doubt(H, W)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, 2, 3], "alternating x and y"),
        ([], "alternating x and y"),
        ([[1, 2, 3]], "alternating x and y"),
        ("ab", "x and y"),
        ([[1, 2], [3]], "x and y"),
        ({"a": 1}, "x and y"),
        (None, "x and y"),
        ([1, float("nan")], "invalid or out-of-range"),
        ([1, float("inf")], "invalid or out-of-range"),
        ([1, 1e300], "invalid or out-of-range coordinate"),
        ([10**400, 1], "x and y"),
        ([["1", "x"]], "x and y"),
    ],
)
def test_values_that_are_no_outline_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        ring(values)


def test_outline_outside_is_doubtful_but_not_at_the_edge():
    assert Outline((ring([-1, 0, 64.5, 0, 64.5, 49, -1, 49]),)).doubt(H, W) is None
    assert painted(Outline((ring([-1, 0, 64.5, 0, 64.5, 49, -1, 49]),))).all()
    assert "36 pixels outside the image of 64x48" in Outline((ring([0, 0, 100, 0, 9, 9]),)).doubt(H, W)


def test_endless_outline_is_not_filled():
    zigzag = np.column_stack((np.tile([0.0, W], LONGEST_PX // W), np.linspace(0, H, 2 * (LONGEST_PX // W))))
    with pytest.raises(ValueError, match="pixels long"):
        Outline((zigzag,)).doubt(H, W)


@st.composite
def masks(draw, most=40):
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random((height, width)) < density


@given(masks())
def test_run_lengths_of_pycocotools_are_read(mask):
    text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    counts = runs.checked(runs.from_text(text), *mask.shape)
    assert (runs.pixels(counts, *mask.shape) == mask).all()
    region = Runs(counts, mask.shape)
    assert region.doubt(*mask.shape) is None and region.area == mask.sum()
    assert (painted(region, *mask.shape) == mask).all()


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=140), max_size=30),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_any_text_as_run_lengths(text, height, width):
    try:
        counts = runs.checked(runs.from_text(text), height, width)
    except ValueError:
        return
    assert runs.pixels(counts, height, width).shape == (height, width)


@pytest.mark.parametrize("counts", [[2**31], [768, 2**40], [-1, 769], [], [3, 4]])
def test_run_lengths_of_another_size_are_refused_without_allocation(counts):
    with pytest.raises(ValueError, match="its counts"):
        Runs(np.array(counts, dtype=np.int64), (24, 32)).doubt(24, 32)
    with pytest.raises(ValueError, match="has 90000x90000 pixels, but the image has 32x24"):
        Runs(np.array([90000 * 90000]), (90000, 90000)).doubt(24, 32)


def test_bitmaps_are_cut_at_the_edges_of_the_image():
    region = Bitmap(-1, 22, (4, 3), lambda: np.ones((4, 3), bool))
    expected = np.zeros((24, 32), bool)
    expected[22:, :2] = True
    assert (painted(region, 24, 32) == expected).all() and region.doubt(24, 32) is None
    assert "outside" in Bitmap(40, 0, (4, 3), lambda: np.ones((4, 3), bool)).doubt(24, 32)
    assert (painted(Outline((ring(SQUARE),)), 24, 32) == (square(1) == 1)).all()
