"""Fallback without compiled C++ operators: everything runs on the plain forms, which is logged once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fault_cases import RECIPE

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="module", params=["missing", "damaged"])
def environment(request, tmp_path_factory) -> dict[str, str]:
    """Environment of a process that finds the operators' package without a library, or with one that does not
    load."""
    folder = tmp_path_factory.mktemp("kernels")
    shutil.copytree(KERNELS / "stpp_kernels", folder / "stpp_kernels",
                    ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if request.param == "damaged":
        (folder / "stpp_kernels" / "_C.so").write_bytes(b"no library")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])}


def test_training_without_compiled_operators_logs_it_once(synthetic, environment, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    done = subprocess.run([sys.executable, "-m", "stpp", "train", "--recipe", recipe, "--data.root",
                           synthetic, "--method",
                           "supervised", "--out", tmp_path / "run"], capture_output=True, text=True,
                          timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "the plain PyTorch forms run instead" in line]
    assert len(said) == 1 and "not built, or failed to load" in said[0]
    (named,) = (line for line in done.stderr.splitlines() if line.startswith("operators: "))
    assert (
        "upsample_cross_entropy reference" in named
        and "upsample_argmax reference" in named
        and "cpp" not in named
    )
