"""Triton kernels compiled for sm_90 without a GPU: all compile, none spills, and images of any size share a
few variants.

`python -m pytest tests/kernels/test_compiled_kernels.py -m "slow or not slow" -s` prints the table of
benchmarks/NOTES.md.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from conftest import ROOT

pytest.importorskip("triton")
PROGRAM = Path(__file__).parents[1] / "compile_cases.py"
OLDER = ROOT / "build" / "triton-3.6.0"
KERNELS = {"forward", "finish", "argmax_kernel", "logsumexp_kernel", "accumulate_kernel", "finalize_kernel",
           "confusion_kernel"}
CONVOLUTIONS = {"convolution_kernel", "weight_gradient_kernel"}
"""Kernels of training that are pipelined through shared memory; their shapes do not vary within a run."""
VERSIONS = [
    "",
    pytest.param("3.6.0", marks=[
        pytest.mark.slow,  # `.ci/run` installs it before the slow tests
        pytest.mark.skipif(not OLDER.is_dir(), reason=f"no {OLDER}: make triton-3.6 installs it"),
    ]),
]  # fmt: skip


def compiled(tmp_path: Path, version: str, *arguments: str, limit_s: float) -> list[dict]:
    """Returns the lines of compile_cases.py, with Triton `version` (empty: the installed one) and a separate
    cache."""
    paths = [*([str(OLDER)] if version else []), os.environ["PYTHONPATH"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths),
                   "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows and (not version or {row["triton"] for row in rows} == {version})
    return rows


def check(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == KERNELS | CONVOLUTIONS
    assert [row for row in rows if row["stack"] or row["local"]] == [], "registers spill"
    for row in rows:  # the least that any GPU gives without asking, and the most of a GeForce
        assert row["shared"] <= (99 if row["kernel"] in CONVOLUTIONS else 48) * 1024, row


def table(rows: list[dict]) -> str:
    """Formats Markdown: kernels by classes, the range of registers over all variants."""
    found = defaultdict(list)
    for row in rows:
        found[row["kernel"], row["case"].split(",")[0]].append(row)
    lines = ["| kernel | classes | variants | registers | shared, bytes |", "|---|---|---|---|---|"]
    for (kernel, case), group in sorted(found.items()):
        ranges = [f"{min(row[name] for row in group)}-{max(row[name] for row in group)}"
                  for name in ("registers", "shared")]
        lines.append(f"| {kernel} | {case} | {len(group)} | {' | '.join(ranges)} |")
    return "\n".join([f"Triton {rows[0]['triton']}, sm_90", *lines])


def test_every_kernel_compiles_without_spills(tmp_path):
    check(compiled(tmp_path, "", "compile", "--classes", "21", limit_s=240))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_all_classes_types_and_layouts_compile_without_spills(version, tmp_path):
    classes = ["2", "19", "21", "150", "255"]
    rows = compiled(tmp_path, version, "compile", "--classes", *classes, "--full", "--jobs", "2", limit_s=840)
    print(f"\n{table(rows)}")
    check(rows)
    losses = [row for row in rows if row["kernel"] == "forward"]
    assert {row["case"].split(",")[0] for row in losses} == {f"C = {number}" for number in classes}


def test_grids_of_very_tall_images_stay_within_cudas_limits(tmp_path):
    (found,) = compiled(tmp_path, "", "grids", limit_s=120)
    assert found["widest"] <= 65535


@pytest.mark.parametrize("version", VERSIONS)
def test_photographs_of_any_size_share_a_handful_of_variants(version, tmp_path):
    (counted,) = compiled(tmp_path, version, "count", limit_s=120)
    del counted["triton"]
    assert counted.keys() == KERNELS
    # Blocks of 32 to 512 pixels a program, and whether a view has the size of the image.
    assert max(counted.values()) <= 5 and sum(counted.values()) <= 16, counted


def test_spilled_registers_are_detected(tmp_path):
    """Checks the reader of compiled kernels on one that must spill: the loss with a quarter of its
    registers."""
    text = (
        "import compile_cases as cases\n"
        "one = next(v for v in cases.calls(21, False).values() if v.kernel.__name__ == '_forward')\n"
        "one.kwargs['maxnreg'] = one.options['maxnreg'] = 40\n"
        "print(cases.row(one)['stack'])"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path),
                   "PYTHONPATH": f"{PROGRAM.parent}:{os.environ['PYTHONPATH']}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120,
                          env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
