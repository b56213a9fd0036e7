"""Coarse map of confidence in a label's row, against a plain form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stpp.label import confidence_map, rows


@given(st.integers(1, 130), st.integers(1, 130), st.integers(1, 5), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_cell_is_the_share_of_the_largest_class_at_its_centre(height, width, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(2, num_classes, height, width, generator=generator) + 0.01
    found = confidence_map.sampled(sums, (height, width)).numpy()
    share = (sums.amax(1) / sums.sum(1)).numpy()
    side = -(-max(height, width) // confidence_map.MOST_CELLS)
    rows_, columns = found.shape[1:]
    assert (rows_, columns) == (-(-height // side),
                                -(-width // side)) and max(rows_, columns) <= confidence_map.MOST_CELLS
    for i in range(rows_):
        for j in range(columns):
            y, x = min(i * side + side // 2, height - 1), min(j * side + side // 2, width - 1)
            np.testing.assert_allclose(found[:, i, j] / 255, share[:, y, x], atol=0.5 / 255 + 1e-6)
    again = confidence_map.read(found[1].tobytes(), height, width)
    assert np.array_equal(again, found[1])
    assert confidence_map.read(found[1].tobytes() + b"0", height, width) is None


def test_cells_are_placed_once_for_each_size():
    confidence_map._centres.cache_clear()
    with torch.inference_mode():
        first = confidence_map.sampled(torch.ones(1, 2, 100, 130), (100, 130))
    made = confidence_map._centres.cache_info().misses
    assert torch.equal(confidence_map.sampled(torch.ones(1, 2, 100, 130), (100, 130)), first) and made == 2
    assert confidence_map._centres.cache_info().misses == made
    assert not confidence_map._centres(100, 3, torch.device("cpu")).is_inference()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nan_confidence_counts_as_zero(value):
    assert confidence_map.sampled(torch.full((1, 3, 2, 2), value), (2, 2)).tolist() == [[[0, 0], [0, 0]]]


def test_columns_are_read_separately_and_missing_ones_skipped(tmp_path):
    path = tmp_path / "table.parquet"
    rows.write(path, [{"key": "a", "reliability": 0.5, "reliable": True}], rows.RELIABILITY)
    assert rows.read(path, ["reliable", "key", "confidence_map"]) == [{"key": "a", "reliable": True}]
    assert rows.read(path) == [{"key": "a", "reliability": 0.5, "reliable": True}]
