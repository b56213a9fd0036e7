"""`stpp doctor`: traps are found, what is broken is said, and its own trials pass here."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from stpp import cli
from stpp.commands import doctor, selftest
from stpp.commands.doctor import Finding
from stpp.images import batches
from stpp.images.batches import has_dali

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


def test_an_unrelated_apex_is_told_by_what_is_in_it(fake_apex):
    found = doctor.apex()
    assert (
        found.state == "warn"
        and "unrelated" in found.text
        and "0.9.10" in found.text
        and "pip uninstall apex" in found.advice
    )
    assert "apex" not in sys.modules


def test_a_genuine_apex_is_told_too(fake_apex):
    (fake_apex / "optimizers").mkdir()
    (fake_apex / "optimizers" / "fused_sgd.py").touch()
    found = doctor.apex()
    assert found.state == "ok" and "NVIDIA's" in found.text and "apex" not in sys.modules


def test_missing_dali_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setattr(batches, "has_dali", lambda: False)
    found = doctor.dali()
    assert found.state == "warn" and "stpp[cuda12]" in found.advice


def test_two_dalis_are_one_too_many(monkeypatch):
    monkeypatch.setattr(batches, "has_dali", lambda: True)
    monkeypatch.setattr(doctor, "version_of", lambda name: "2.4.0" if "dali" in name else None)
    assert "pip uninstall" in doctor.dali().advice


def built(folder: Path, *, age_s: float) -> Path:
    """A folder of operators whose build is so much older than its sources."""
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


def test_a_stale_build_is_a_warning_with_how_to_build_again(monkeypatch):
    monkeypatch.delenv("STPP_KERNELS", raising=False)
    monkeypatch.setattr(doctor, "stale_build", lambda folder: "_C.so was built before argmax.cpp was changed")
    found = doctor.operators()
    assert found.state == "warn" and "argmax.cpp" in found.text and found.advice == doctor.REBUILD


def test_an_operator_that_computes_something_else_fails_its_trial(monkeypatch):
    import stpp_kernels

    right = stpp_kernels.confusion
    monkeypatch.setattr(stpp_kernels, "confusion", lambda *args: right(*args) + 1000)
    with pytest.raises(ValueError, match="confusion differs by"):
        selftest.operators(CPU)


def test_what_cannot_be_looked_at_is_said_and_not_raised():
    def look():
        raise OSError("the driver\nis gone")

    found = doctor._asked("gpu", look)
    assert found.state == "warn" and found.text == "failed: the driver is gone" and "\n" not in found.line()


def test_a_needed_part_that_fails_ends_with_1(monkeypatch, capsys):
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


def test_every_part_has_one_line_and_the_machine_has_what_the_tests_need(capsys):
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


def test_the_trials_pass_here():
    assert "operators" in selftest.operators(CPU)
    assert "decoded" in selftest.decode(CPU, dali=False)
    assert "training step" in selftest.train_step(CPU)
    if has_dali():
        assert "decoded" in selftest.decode(CPU, dali=True)


@pytest.mark.slow
def test_the_whole_examination_passes_here(capsys):
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    trials = [line.split()[:1] + line[6:22].split() for line in lines if " try " in line]
    assert ["ok", "try", "engine"] in trials and ["ok", "try", "train"] in [trial[:3] for trial in trials]
    assert not [line for line in lines if line.startswith("fail")]
