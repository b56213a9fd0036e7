"""The README's figures are those of committed rows, and every row says what it was measured on."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import table  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))


def test_the_tables_of_the_readme_are_made_of_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.filled(text) == text, "run `python benchmarks/table.py`"


def test_a_figure_without_a_row_is_noticed(monkeypatch):
    monkeypatch.setattr(table, "RATIOS", (("x", "y", "loss-cpu", "loss.no_such_ratio"),))
    with pytest.raises(KeyError, match="no_such_ratio"):
        table.ratios()
    monkeypatch.setattr(table, "RUNS", (("x", "loss-cpu", "no-such-run"),))
    with pytest.raises(KeyError, match="no-such-run"):
        table.scores()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_say_where_they_come_from(path):
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"name", "device", "threads", "versions", "git", "date"} <= row.keys()
        assert "value" in row or {"variant", "shape", "dtype", "median", "p20", "p80", "unit"} <= row.keys()
