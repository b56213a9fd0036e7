"""The wheel: works outside the checkout, with its recipes and its C++ operators; one version everywhere."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import stpp
from stpp_kernels import dispatch

ROOT = Path(__file__).parents[1]


def test_version_is_the_same_in_changelog_and_citation():
    changes, citation = ((ROOT / name).read_text("utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    latest = re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
    cited = re.search(r"^version: \"?([\d.]+)", citation, re.MULTILINE)
    assert latest[1] == cited[1] == stpp.__version__


@pytest.mark.parametrize("capability, expected", [
    ("AVX512", ["_C_x86_64_v4", "_C_x86_64_v3"]), ("AVX2", ["_C_x86_64_v3"]), ("DEFAULT", [])])
def test_only_operators_that_the_processor_can_run_are_loaded(tmp_path, capability, expected):
    for name in ("_C_x86_64_v3", "_C_x86_64_v4"):
        (tmp_path / f"{name}.cpython-311-x86_64-linux-gnu.so").touch()

    def chosen() -> list[str]:
        return [path.name.split(".")[0] for path in dispatch._libraries(tmp_path, capability)]

    assert chosen() == expected
    (tmp_path / "_C.pyd").touch()  # a checkout's own, for its own machine
    assert chosen() == ["_C", *expected]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_runs_outside_the_checkout(tmp_path):
    checkout, venv = tmp_path / "checkout", tmp_path / "venv"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), str(checkout)], check=True)
    environment = os.environ | {"STPP_MARCH": "x86-64-v3 x86-64-v4"}
    for name in ("PYTHONPATH", "STPP_KERNELS"):
        environment.pop(name, None)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index",
                    "--wheel-dir", str(tmp_path), str(checkout)], check=True, env=environment)
    (wheel,) = tmp_path.glob(f"stpp-{stpp.__version__}-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)],
                   check=True, env=environment)
    # The other packages are those of this environment, whose .pth files (of a checkout, say) are not read.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*args: str) -> str:
        done = subprocess.run([str(venv / "bin" / "stpp"), *args], cwd=tmp_path, env=environment, text=True,
                              capture_output=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    code = "import stpp, stpp_kernels; print(stpp.__file__, stpp_kernels.__file__)"
    where = subprocess.run([str(python), "-c", code], cwd=tmp_path, env=environment, text=True,
                           capture_output=True, check=True).stdout.split()
    assert all(Path(file).is_relative_to(venv) for file in where)
    assert run("--version").strip() == f"stpp {stpp.__version__}"
    assert run("recipes").count("\n") == len(list((ROOT / "launch" / "recipes").glob("*.toml")))
    assert '"backbone": "efficientnet-lite0"' in run("train", "--recipe", "camvid_unimatch", "--print-config")
    lines = run("doctor").splitlines()
    assert not [line for line in lines if line.startswith("fail")]
    (operators,) = (line for line in lines if line.split()[1:2] == ["operators"])
    assert "upsample_cross_entropy cpp" in operators
    run("demo", "--small", "--out", "demo")
    assert (tmp_path / "demo" / "run" / "results.json").is_file()
