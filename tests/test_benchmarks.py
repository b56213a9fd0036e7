"""The README's figures are those of committed rows, every row says what it was measured on, and every benchmark runs."""

import json
import subprocess
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
    monkeypatch.setattr(table, "RATIOS", (("x", "y", "loss", "loss.no_such_ratio"),))
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


SMALLEST = {
    "agreement": "--images 1 --tta none --engines eager:fp32",
    "checkpoint": "--rounds 1 --crop 33",
    "corpus": "--counts 40 --shard-size 16",
    "data": "--rounds 1 --batch 2 --batches 1 --crop 33",
    "label": "--images 1 --backbone resnet18 --tta none stpp --backend eager --workers 1",
    "loss": "--rounds 1 --no-compile",
    "ops": "--rounds 1 --no-compile --only dilated_conv --maps 9x9",
    "scaling": "--rounds 1 --crop 33 --per-rank 2",
    "selftrain": "--shorten 80 --pictures 32",
    "step": "--rounds 1 --backbone resnet18 --output-stride 32 --crop 33 --no-compile",
    "teacher": "--rounds 1 --backbone resnet18 --output-stride 32 --batches 1 --sizes 33x49 --backends inductor",
}
"""Arguments that make a benchmark short, by its name."""


def test_every_benchmark_is_tried():
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} == set(SMALLEST)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALLEST))
def test_a_benchmark_runs_and_writes_its_rows(name, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), *SMALLEST[name].split(), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    assert all({"device", "threads", "versions", "git", "date"} <= row.keys() for row in rows)
