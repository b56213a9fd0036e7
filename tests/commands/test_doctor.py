"""`stpp doctor`: known problems are found and reported, and its own trials pass here."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from stpp import cli
from stpp.commands import doctor, selftest
from stpp.commands.doctor import Finding
from stpp.images import batches
from stpp.images.batches import has_dali
from stpp.processes import OtherLoad

CPU = torch.device("cpu")


@pytest.fixture
def fake_apex(tmp_path, monkeypatch) -> Path:
    """A distribution named apex that must not be imported."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was run')")
    record = tmp_path / "apex-0.9.10.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return package


def test_unrelated_apex_is_recognised_by_its_contents(fake_apex):
    found = doctor.apex()
    assert (
        found.state == "warn"
        and "unrelated" in found.text
        and "0.9.10" in found.text
        and "pip uninstall apex" in found.advice
    )
    assert "apex" not in sys.modules


def test_genuine_apex_is_recognised(fake_apex):
    (fake_apex / "optimizers").mkdir()
    (fake_apex / "optimizers" / "fused_sgd.py").touch()
    found = doctor.apex()
    assert found.state == "ok" and "NVIDIA's" in found.text and "apex" not in sys.modules


def test_missing_dali_is_reported_with_the_package(monkeypatch):
    monkeypatch.setattr(batches, "has_dali", lambda: False)
    found = doctor.dali()
    assert found.state == "warn" and "stpp[cuda12]" in found.advice


def test_two_dali_packages_are_reported(monkeypatch):
    monkeypatch.setattr(batches, "has_dali", lambda: True)
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.4.0" if "dali" in name else None)
    assert "pip uninstall" in doctor.dali().advice


def built(folder: Path, *, age_s: float) -> Path:
    """Folder of operators whose build is this much older than its sources."""
    (folder / "csrc").mkdir()
    for name, time_s in (("csrc/argmax.cpp", 1e9), ("_C.cpython-311.so", 1e9 - age_s)):
        (folder / name).touch()
        os.utime(folder / name, (time_s, time_s))
    return folder


@pytest.mark.parametrize(("age_s", "stale"), [(3600, True), (1, False), (-3600, False)])
def test_a_build_older_than_its_sources_is_stale(tmp_path, age_s, stale):
    found = doctor.stale_build(built(tmp_path, age_s=age_s))
    assert bool(found) == stale
    assert not stale or "argmax.cpp" in found


def test_stale_build_is_a_warning_with_the_remedy(monkeypatch):
    monkeypatch.delenv("STPP_KERNELS", raising=False)
    monkeypatch.setattr(doctor, "stale_build", lambda folder: "_C.so was built before argmax.cpp was changed")
    found = doctor.operators()
    assert found.state == "warn" and "argmax.cpp" in found.text and found.advice == doctor.REBUILD


def test_wrong_operator_fails_its_trial(monkeypatch):
    import stpp_kernels

    right = stpp_kernels.confusion
    monkeypatch.setattr(stpp_kernels, "confusion", lambda *args: right(*args) + 1000)
    with pytest.raises(ValueError, match="confusion differs by"):
        selftest.operators(CPU)


def test_failing_check_is_reported_and_not_raised():
    def check():
        raise OSError("the driver\nis gone")

    found = doctor._asked("gpu", check)
    assert found.state == "warn" and found.text == "failed: the driver is gone" and "\n" not in found.line()


def test_failure_of_a_required_part_exits_with_1(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "findings",
        lambda self_test: iter(
            [
                Finding("disk", "warn", "small", "buy one"),
                Finding("torch", "fail", "not installed", "install it"),
            ]
        ),
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["warn", "disk"],
                                                    ["fail", "torch"]] and lines[1].endswith("-> install it")


def test_every_part_has_one_line_and_the_machine_suits_the_tests(capsys):
    cli.main(["doctor", "--json", "--no-self-test"])
    report = json.loads(capsys.readouterr().out)
    found = {one["part"]: one for one in report["findings"]}
    assert report["ok"] and len(found) == len(report["findings"])
    assert list(found) == ["machine", "torch", "processor", "gpu", "collectives", "dali", "tensorrt",
                           "torch-tensorrt", "triton",
                           "apex", "operators", "disk", "open files", "shared memory"]
    assert torch.__version__ in found["torch"]["text"]
    assert all("\n" not in one["text"] + one["advice"] for one in report["findings"])
    assert (found["dali"]["state"] == "ok") == has_dali()


def test_trials_pass():
    assert "operators" in selftest.operators(CPU)
    assert "decoded" in selftest.decode(CPU, dali=False)
    assert "training step" in selftest.train_step(CPU)
    if has_dali():
        assert "decoded" in selftest.decode(CPU, dali=True)


@pytest.mark.parametrize("many_s, state", [(0.5, "ok"), (2.0, "warn")])
def test_threads_slower_than_one_are_a_warning_with_the_load_of_others(monkeypatch, many_s, state):
    clock = iter(sum(([start, start + (1.0 if i % 2 == 0 else many_s)]
                      for i, start in enumerate(range(0, 20 * selftest.THREAD_ROUNDS, 10))), []))
    monkeypatch.setattr(selftest.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(selftest.OtherLoad, "cores", lambda self: 1.25)
    before = torch.get_num_threads()
    finding = doctor._asked("try threads", lambda: doctor._ok("try threads", selftest.threads(2)))
    assert finding.state == state and torch.get_num_threads() == before
    assert finding.text.endswith("2 threads are 2.0 times as fast as one" if state == "ok" else
                                 "0.5 times as fast as one; other processes use 1.2 of the cores of this one")


def test_other_load_counts_other_processes_and_not_this_one():
    load = OtherLoad()
    if load.cores() is None:
        pytest.skip("/proc/stat is missing or counts nothing on this system")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.5)
        load.cores()
        time.sleep(1)
        others = load.cores()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert 0.5 < others <= len(os.sched_getaffinity(0)) + 0.2


@pytest.mark.slow
def test_whole_examination_passes(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    trials = [line.split()[:1] + line[6:22].split() for line in lines if " try " in line]
    assert ["ok", "try", "engine"] in trials and ["ok", "try", "train"] in [trial[:3] for trial in trials]
    assert not [line for line in lines if line.startswith("fail")]
