"""The README's figures match committed rows, every row names its machine, and every benchmark runs."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_data  # noqa: E402
import bench_rare  # noqa: E402
import harness  # noqa: E402
import table  # noqa: E402

RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))


@pytest.mark.parametrize("page", table.PAGES)
def test_tables_are_made_of_rows(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert table.filled(page, text) == text, "run `python benchmarks/table.py`"


def test_figure_without_a_row_fails(monkeypatch):
    monkeypatch.setattr(table, "RATIOS", (("x", "y", "loss", "loss.no_such_ratio"),))
    with pytest.raises(KeyError, match="no_such_ratio"):
        table.ratios()
    monkeypatch.setattr(table, "GAINS", (("x", "demo-cpu-bf16", ("demo-seed0", "demo-seed7")),))
    with pytest.raises(KeyError, match="demo-seed7"):
        table.gains()
    monkeypatch.setattr(table, "RUNS", (("x", "loss-cpu", "no-such-run"),))
    with pytest.raises(KeyError, match="no-such-run"):
        table.scores()


def test_gpu_columns_appear_with_their_rows(monkeypatch):
    assert "H100" not in table.ratios()
    on_cpus = table.values
    rows = {"step-h100": {"step.engine_vs_public_ratio": 3.25, "step.engine_share_of_matmul_rate": 0.41},
            "loss-h100": {"loss.fused_vs_eager_ratio": 7.0}}
    monkeypatch.setattr(table, "values", lambda file: rows.get(file) or on_cpus(file))
    head, _, *lines = table.ratios().splitlines()
    assert head == "| what | against | AVX-512 | AVX-512 with bf16 | AMX | H100 | rows |"
    assert all(line.count("|") == head.count("|") for line in lines)
    (step,) = (line for line in lines if line.endswith("| `step`: `step.engine_vs_public_ratio` |"))
    assert "(GPU: 16 x 321 px)" in step and step.split("|")[6].strip() == "3.2"
    (share,) = (line for line in lines if "share_of_matmul" in line)
    assert share.split("|")[6].strip() == "0.41"
    assert not any("r101" in line for line in lines)  # no row, no line


def test_rows_name_part_and_commit_of_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("STPP_GIT", "abc")
    monkeypatch.setenv("STPP_PART", "some-part")
    out = tmp_path / "rows.jsonl"
    parser = harness.arguments("x", {"rounds": 1})
    for more in ([], ["--append"], ["--append", "--small", "--rounds", "5"]):
        options = parser.parse_args(["--out", str(out), "--device", "cpu", *more])
        report = harness.Report(options)
        report.summary("x.y", 2.0)
        assert json.loads(out.read_text().splitlines()[-1])["value"] == 2.0  # immediately, not at the end
    assert report.rounds == 1  # --small overrides
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["part"], row["git"]) for row in rows] == [("some-part", "abc")] * 3
    harness.Report(parser.parse_args(["--out", str(out), "--device", "cpu"]))
    assert out.read_text() == ""


@pytest.mark.parametrize("workers", [8, 16, 64])
def test_more_batches_are_drained_than_a_loader_queues(workers):
    prefetched_by_each = 2  # PyTorch's default, which the peers use
    assert bench_data.untimed_batches(workers) > prefetched_by_each * workers


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_rows_name_their_origin(path):
    for line in path.read_text().splitlines():
        row = json.loads(line)
        assert {"name", "device", "threads", "versions", "git", "date"} <= row.keys()
        assert "value" in row or {"variant", "shape", "dtype", "median", "p20", "p80", "unit"} <= row.keys()


SMALLEST = {
    "annotations": "--small",
    "agreement": "--images 1 --tta none --engines eager:fp32",
    "checkpoint": "--rounds 1 --crop 33",
    "corpus": "--counts 40 --shard-size 16",
    "data": "--small",
    "fused_conv": "--small",
    "label": "--small --tta none stpp",
    "loss": "--small --graphs",
    "ops": "--small --only dilated_conv depthwise_conv batch_norm_clamp",
    "prepare": f"--small --before {ROOT}",
    "profile": "--small",
    "rare": "--small",
    "scaling": "--rounds 1 --crop 33 --per-rank 2",
    "selftrain": "--shorten 80 --pictures 32",
    "shapes": "--small",
    "step": "--small",
    "teacher": "--small --backends inductor",
    "threads": "--small",
    "unimatch": "--small",
}
"""Arguments that make a benchmark short, by its name."""


def test_every_benchmark_is_covered():
    assert {path.stem.removeprefix("bench_")
            for path in (ROOT / "benchmarks").glob("bench_*.py")} == set(SMALLEST)


def test_rare_runs_in_the_file_are_known_if_they_are_whole(tmp_path):
    out = tmp_path / "rows.jsonl"
    values = {"camvid.none.seed0": ("miou_pct", "iou_pct.pole", "warned"), "camvid.none.seed1": ("miou_pct",),
              "camvid.none.mean": ("miou_pct",)}
    out.write_text("".join(json.dumps({"name": f"rare.{run}.{key}", "value": 1.0}) + "\n"
                           for run, keys in values.items() for key in keys))
    whole = {"rare.camvid.none.seed0": dict.fromkeys(("miou_pct", "iou_pct.pole", "warned"), 1.0)}
    assert bench_rare.earlier(argparse.Namespace(append=True, out=out)) == whole
    assert bench_rare.earlier(argparse.Namespace(append=False, out=out)) == {}
    assert bench_rare.earlier(argparse.Namespace(append=True, out=tmp_path / "new.jsonl")) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SMALLEST))
def test_benchmark_runs_and_writes_its_rows(name, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), *SMALLEST[name].split(),
               "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    assert all({"device", "threads", "versions", "git", "date"} <= row.keys() for row in rows)
