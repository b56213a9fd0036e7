"""run_gpu.sh: each part runs, in its smallest form, on a CPU; an interrupted call leaves complete files; and
its helpers."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_profile  # noqa: E402
import take  # noqa: E402
from summary import described, whole_rows  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
LIMIT_S = 1500
PARTS = {
    "first": {"step", "profile", "profile-no-search", "shapes", "fused-conv", "teacher-eager", "loss",
              "label",
              "label-mixed", "run"},
    "second": {"step", "unimatch", "step-r101-721", "ops-conv", "teacher", "label", "label-mixed",
               "ops-labelling", "resume", "memory"},
}
"""Parts that write rows."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


def call(*args: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(SCRIPT), *args], env=environment(**more), capture_output=True, text=True,
                          timeout=LIMIT_S)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
@pytest.mark.parametrize("number", ["first", "second"])
def test_every_part_of_a_call_runs(number, tmp_path):
    earlier = tmp_path / "unpassed.txt"
    earlier.write_text(
        "tests/kernels/test_argmax.py::test_empty_batch_and_float64\n"
        "tests/kernels/test_argmax.py::test_gone\n"
    )
    args = ["--unpassed", str(earlier)] if number == "second" else []
    done = call(number, str(tmp_path / "out"), "--device", "cpu", "--small", *args, STPP_GIT="some-commit")
    assert done.returncode == 0, done.stdout[-4000:]
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["part"] for row in rows} - {"data"} == PARTS[number]  # data: where DALI is installed
    assert {row["git"] for row in rows} == {"some-commit"}
    summary = done.stdout.split(f"\n{number} call on cpu, commit some-commit:\n")[1]
    ended = dict(re.findall(r"^  (\S+): (exit \d+)", summary, re.MULTILINE))
    assert PARTS[number] | {"tests"} <= ended.keys() and set(ended.values()) == {"exit 0"}, summary
    assert summary in (tmp_path / "out" / "log.txt").read_text() + "\n"
    assert len(list((tmp_path / "out").iterdir())) <= 8
    assert (tmp_path / "out" / "unpassed.txt").read_text() == ""
    value = {row["name"]: row["value"] for row in rows if "value" in row}
    if number == "second":
        assert value["resume.equal"] == value["resume.repeats"] == value["memory.cross_entropy_clean"] == 1
        assert "step.engine_vs_tuned_eager_ratio" in value and "teacher.ratio.inductor" in value
    else:
        assert {"profile.conv_forward_ms", "profile.host_ms", "shapes.forward_first_costs_ms",
                "run.6-retrain_s"} <= value.keys()


def test_all_files_with_gpu_tests_are_run():
    (listed,) = re.findall(r"^files=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)
    tests = ROOT / "tests"
    marked = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.rglob("test_*.py")
              if re.search(r"pytest\.mark\.gpu|from kernels(_label)?_cases", path.read_text())}
    # Minutes of compiling: the second call has a case; those machines lack TensorRT.
    compiling = {"inference/test_engines_gpu", "inference/test_tensorrt"}
    assert marked - compiling - {"benchmarks/test_run_gpu"} == set(listed.split())


def test_import_check_names_every_package_that_modules_import():
    """A module that imports a package only in a function can do without it."""
    (named,) = re.findall(r'^needed="import (.*)$', SCRIPT.read_text(), re.MULTILINE)
    checked = {name.strip().split(".")[0] for name in named.split(",")}
    own = {"stpp", "stpp_kernels", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}
    files = [path for folder in ("engine", "kernels") for path in (ROOT / folder).rglob("*.py")]
    imported = {name for path in files for name in imports(ast.parse(path.read_text()))}
    optional = {"triton", "nvidia"}  # modules that are imported only where these are installed
    assert "braceexpand" in imported and imported <= checked | own | optional | set(sys.stdlib_module_names)


def imports(tree: ast.Module) -> set[str]:
    """Returns the top-level names of the packages that a module imports when it is imported."""
    absolute = [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level]
    plain = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in (*absolute, *plain)}


def descendants(pid: int) -> list[int]:
    """Lists the processes below a process, including those of other sessions."""
    try:
        children = [int(one) for path in Path(f"/proc/{pid}/task").iterdir()
                    for one in (path / "children").read_text().split()]
    except OSError:
        return []
    return [*children, *(one for child in children for one in descendants(child))]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_call_keeps_its_results(number, tmp_path):
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log.txt"
    process = subprocess.Popen([str(SCRIPT), "first", str(tmp_path), "--device", "cpu", "--small"],
                               env=environment(), stdout=subprocess.PIPE, text=True)
    while not rows.exists() or rows.read_text().count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.05)
    below = descendants(process.pid)
    process.send_signal(number)
    if number == signal.SIGKILL:
        for pid in below:
            os.kill(pid, number)
    said = process.communicate(timeout=120)[0]
    text = rows.read_text()
    assert text.endswith("\n") and len([json.loads(line) for line in text.splitlines()]) >= 4
    assert "\n== step, " in log.read_text() and "step.deeplabv3plus" in log.read_text()
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert (
            "  cut off by a signal" in said
            and "step.engine_images_per_s" in said.split("cut off by a signal")[-1]
        )
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()
                    and "bench_" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.parametrize("args", [(), ("third",), ("first", "--nonsense"), ("first", "--limit"),
                                  ("second", "--unpassed", "no-such-file")])
def test_wrong_arguments_are_refused(args, tmp_path):
    done = call(*args, OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_missing_package_ends_the_call_with_one_line(tmp_path):
    (tmp_path / "tqdm.py").write_text("raise ModuleNotFoundError(\"No module named 'tqdm'\")")
    done = call("first", str(tmp_path / "out"), "--device", "cpu", "--small", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "No module named 'tqdm'" in line and "make gpu-wheels" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


def test_parts_without_time_are_skipped(tmp_path):
    done = call("first", str(tmp_path), "--device", "cpu", "--small", "--limit", "0")
    assert "  step: skipped, no time left" in done.stdout and "  tests: skipped, no time left" in done.stdout
    assert done.returncode == 124  # the tests did not pass: they did not run


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_unpassed_tests_are_recorded_and_run_again(workers, tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', ['a b', 'c'])\ndef test_a(i): assert i == 'c'\n"
        "def test_skipped(): pytest.skip('x')\n"
        "@pytest.fixture\ndef broken():\n    yield\n    raise ValueError\n"
        "def test_teardown(broken): pass\n")

    def run(*args: str) -> str:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "unpassed", "-p", "no:cacheprovider",
                        "--rootdir=.", *workers,
                        "--unpassed=kept.txt", *args], cwd=tmp_path, capture_output=True, timeout=200,
                       env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")})
        return (tmp_path / "kept.txt").read_text()

    assert run() == "test_x.py::test_a[a b]\ntest_x.py::test_teardown\n"
    (tmp_path / "before.txt").write_text(
        "test_x.py::test_a[c]\ntest_x.py::test_a[a b]\ntest_x.py::test_gone\n"
    )
    assert run("--only=before.txt") == "test_x.py::test_a[a b]\n"


def test_killed_run_records_tests_that_did_not_run(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): os._exit(3)\ndef test_c(): pass\n"
    )
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "unpassed", "--rootdir=.",
                    "--unpassed=kept.txt"], cwd=tmp_path,
                   capture_output=True, timeout=200,
                   env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")})
    assert (tmp_path / "kept.txt").read_text() == "test_x.py::test_b\ntest_x.py::test_c\n"


@pytest.mark.parametrize(("operators", "kernel", "expected"), [
    (["aten::cudnn_convolution", "aten::_convolution", "aten::conv2d"], "sm90_xmma_fprop_implicit_gemm",
     "conv_forward"),
    (["aten::convolution_backward", "ConvolutionBackward0"], "sm90_xmma_dgrad_implicit_gemm",
     "conv_input_gradient"),
    (["aten::convolution_backward", "ConvolutionBackward0"], "sm90_xmma_wgrad_implicit_gemm",
     "conv_weight_gradient"),
    (["aten::convolution_backward", "ConvolutionBackward0"], "nvjet_tst_128x256", "conv_other_gradient"),
    (["aten::copy_", "aten::_to_copy", "aten::to", "aten::conv2d"], "elementwise_kernel", "casts"),
    (["aten::cudnn_batch_norm", "aten::_batch_norm_impl_index"], "cudnn::bn_fw_tr_1C11", "batch_norm"),
    (["aten::cudnn_batch_norm_backward", "CudnnBatchNormBackward0"], "cudnn::bn_bw", "batch_norm"),
    (["aten::threshold_backward", "ReluBackward0"], "vectorized_elementwise", "relu"),
    (["aten::add_"], "vectorized_elementwise", "add"),
    (["stpp_kernels::upsample_cross_entropy"], "_forward", "loss"),
    (["aten::mul", "GeneratedBackwardFor_stpp_kernels_upsample_cross_entropy_default"], "vectorized", "loss"),
    (["aten::_fused_sgd_", "Optimizer.step#SGD.step"], "multi_tensor_apply_kernel", "optimizer"),
    (["aten::_foreach_norm"], "multi_tensor_apply_kernel", "gradient_norm"),
    (["triton_poi_fused_add_native_batch_norm_relu_0"], "triton_poi_fused_add_native_batch_norm_relu_0",
     "compiled"),
    (["aten::cat"], "CatArrayBatchedCopy", "rest"),
])
def test_kernels_are_sorted_by_the_operators_that_launched_them(operators, kernel, expected):
    assert bench_profile.class_of(operators, kernel) == expected


def test_profile_counts_each_kernel_and_each_overlap_once():
    parent = SimpleNamespace(name="aten::relu_", cpu_parent=None, device_type=DeviceType.CPU, kernels=[])
    child = SimpleNamespace(name="aten::clamp_min_", cpu_parent=parent, device_type=DeviceType.CPU,
                            kernels=[SimpleNamespace(name="k", duration=2000),
                                     SimpleNamespace(name="k", duration=1000)])

    def device(begin, end, note=False):
        return SimpleNamespace(device_type=DeviceType.CUDA, time_range=SimpleNamespace(start=begin, end=end),
                               is_user_annotation=note)

    events = [parent, child, device(1000, 3000), device(2000, 4000), device(7000, 8000),
              device(0, 99000, note=True)]
    assert bench_profile.class_ms(events, on_device=True) == {"relu": 3.0}
    assert bench_profile.busy_ms(events) == (4.0, 7.0)
    assert bench_profile.busy_ms([parent]) == (0.0, 0.0)


def test_truncated_row_is_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert whole_rows(path) == [] and described([]) == "no summary rows"
    path.write_text(
        '{"name": "a", "value": 1, "part": "p"}\n{"name": "a", "value": 2, "part": "p"}\n{"name": "b", "va'
    )
    assert described(whole_rows(path)).split() == ["p", "a", "2"]


def test_rows_are_taken_from_the_last_run_of_each_part():
    def row(part, date, value, device="NVIDIA H100 80GB HBM3"):
        return {"name": "a", "part": part, "date": date, "value": value, "device": device}

    rows = [row("step", "2026-11-27T10:00", 1), row("step", "2026-11-27T11:00", 2),
            row("loss", "2026-11-27T10:01", 3), row("step", "2026-11-27T12:00", 4, "AMD EPYC"),
            row("step", "2026-11-27T09:00", 5, "NVIDIA H200")]
    found = take.kept(rows)
    assert {name: [one["value"] for one in kept] for name, kept in found.items()} == {
        "step-h100": [2], "loss-h100": [3], "step-h200": [5]}


def test_rows_that_a_cut_off_run_lacks_are_those_of_an_earlier_run_of_the_commit():
    def row(name, date, value, git="c1"):
        return {"name": name, "part": "step", "date": date, "value": value, "git": git,
                "device": "NVIDIA H100"}

    rows = [row("a", "10:00", 1), row("ratio", "10:00", 2), row("a", "11:00", 3),
            row("old", "09:00", 4, "c0")]
    assert {one["name"]: one["value"] for one in take.kept(rows)["step-h100"]} == {"a": 3, "ratio": 2}


def test_carried_packages_match_the_requirements():
    recipe = subprocess.run(["make", "-n", "gpu-wheels"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout
    requirements = (ROOT / "requirements.txt").read_text()
    pinned = re.findall(r"^(?:tyro|braceexpand)==\S+", requirements, re.MULTILINE)
    assert len(pinned) == 2 and all(f" {each} " in recipe for each in pinned)
    assert "docstring-parser==" in recipe and "typeguard==" in recipe
    assert "--no-deps" in recipe and "--only-binary=:all:" in recipe and "--python-version 3.12" in recipe
