"""Outlines of pixels cover exactly the region that they were drawn from, with its holes."""

import numpy as np
import pycocotools.mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from shape_cases import exact
from stpp.annotations.outlines import polygon
from stpp.annotations.regions import Outline


@st.composite
def regions(draw):
    """Draws a connected region, bool [H, W], of noise or of blocks, often with holes."""
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([1, 2, 5]))
    noise = rng.random((height // grain + 1, width // grain + 1)) < draw(st.sampled_from([0.5, 0.7, 0.95]))
    mask = np.kron(noise, np.ones((grain, grain), bool))[:height, :width]
    mask[rng.integers(height), rng.integers(width)] = True
    labels, count = ndimage.label(mask)
    return labels == int(np.bincount(labels.ravel())[1:].argmax()) + 1


@settings(max_examples=100)
@given(regions())
def test_outlines_cover_their_region(region):
    height, width = region.shape
    ring = polygon(region)
    inside, _ = exact(ring.astype(float), height, width)
    assert (inside == region).all()
    filled = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], height, width))[..., 0]
    assert (filled == region).all()
    if len(ring) > 2:
        assert Outline((ring.astype(float),)).doubt(height, width) is None


def test_ring_of_pixels_keeps_its_hole():
    region = np.ones((3, 3), bool)
    region[1, 1] = False
    assert len(polygon(region)) == 4 + 4 + 3
    assert polygon(np.ones((2, 3), bool)).tolist() == [[0, 0], [3, 0], [3, 2], [0, 2]]
