"""Faults in training: a run killed many times ends like an undisturbed one."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fault_cases as cases

SEED = 20261122


@pytest.fixture(scope="module")
def command(synthetic, synthetic_index, tmp_path_factory) -> list[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    recipe.write_text(cases.RECIPE)
    return ["train", "--recipe", str(recipe), "--data.root", str(synthetic), "--data.index",
            str(synthetic_index), "--out"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory) -> tuple[Path, list[str]]:
    """Returns an undisturbed run and its events."""
    folder = tmp_path_factory.mktemp("alone")
    ran = cases.run([*command, str(folder / "run")], events=folder / "events")
    assert ran.returncode == 0, ran.stderr
    events = (folder / "events").read_text().splitlines()
    assert len(set(events)) == len(events)
    return folder / "run", events


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_run_killed_fourteen_times_ends_like_an_undisturbed_one(command, alone, tmp_path):
    expected, events = alone
    points = cases.chosen(events, 14, SEED)
    print(f"seed {SEED}: {points}")
    assert cases.finish([*command, str(tmp_path / "run")], tmp_path, points, signal.SIGKILL) == 14
    assert cases.differing(cases.contents(tmp_path / "run"), cases.contents(expected)) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_sigterm_saves_and_run_resumes(command, alone, tmp_path):
    expected, events = alone
    points = [event for event in events if event in (
        "step 1-supervised 5", "replace 2-select/DONE.json", "step 4-retrain 1", "step 6-retrain 7")]
    assert len(points) == 4
    cases.finish([*command, str(tmp_path / "run")], tmp_path, points, signal.SIGTERM)
    assert cases.differing(cases.contents(tmp_path / "run"), cases.contents(expected)) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["unimatch-v2", "unimatch"])
def test_one_stage_survives_kills(command, tmp_path, method):
    """Student and moving average (UniMatch-V2) end with the same bits, after deaths in a step, in a save, and
    between the two files."""
    out = [*command[:-1], "--method", method, "--consistency.confidence", "0.3", "--train.epochs", "2",
           command[-1]]
    ran = cases.run([*out, str(tmp_path / "alone")], events=tmp_path / "events")
    assert ran.returncode == 0, ran.stderr
    events = (tmp_path / "events").read_text().splitlines()
    points = [next(event for event in events[start:] if event.startswith(f"{kind} 1-{method}"))
              for kind, start in (("step", 2), ("half", 0), ("replace", 0))] + [events[-1]]
    points = sorted(set(points), key=events.index)
    assert len(points) == 4
    assert cases.finish([*out, str(tmp_path / "run")], tmp_path, points, signal.SIGKILL) == 4
    assert cases.differing(cases.contents(tmp_path / "run"), cases.contents(tmp_path / "alone")) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_two_ranks_resume_with_one_moving_average(command, tmp_path):
    """Batch norms normalise over a rank's images, and the average labels with their statistics: a checkpoint
    holds those of rank 0, so every rank must label with these."""
    out = [*command[:-1], "--method", "unimatch-v2", "--consistency.confidence", "0", "--train.epochs", "2",
           "--train.lr", "0.1", command[-1]]
    ran = cases.run([*out, str(tmp_path / "alone")], ranks=2)
    assert ran.returncode == 0, ran.stderr
    bomb = {"event": "half 1-unimatch-v2/last.pt 6", "signal": signal.SIGKILL, "rank": 0}
    ran = cases.run([*out, str(tmp_path / "run")], bomb=bomb, fired=tmp_path / "fired", ranks=2)
    assert (tmp_path / "fired").exists() and ran.returncode, ran.stderr[-2000:]
    ran = cases.run([*out, str(tmp_path / "run")], ranks=2)
    assert ran.returncode == 0 and "resuming from step 4" in ran.stderr, ran.stderr[-2000:]
    assert cases.differing(cases.contents(tmp_path / "run"), cases.contents(tmp_path / "alone")) == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_two_ranks_resume_after_one_dies(command, tmp_path):
    ran = cases.run([*command, str(tmp_path / "alone")], ranks=2)
    assert ran.returncode == 0, ran.stderr
    out = [*command, str(tmp_path / "run")]
    deaths = ((0, "half 1-supervised/last.pt 4", 0), (1, "step 4-retrain 2", 0), (1, "step 6-retrain 3", 1))
    for number, (rank, event, restarts) in enumerate(deaths):
        fired = tmp_path / f"fired-{number}"
        bomb = {"event": event, "signal": signal.SIGKILL, "rank": rank}
        ran = cases.run(out, bomb=bomb, fired=fired, ranks=2, restarts=restarts)
        assert fired.exists() and (ran.returncode == 0) == bool(restarts), ran.stderr[-2000:]
    ran = cases.run(out, ranks=2)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert cases.differing(cases.contents(tmp_path / "run"), cases.contents(tmp_path / "alone")) == []


@pytest.mark.slow
@pytest.mark.dist
def test_hanging_rank_ends_the_run_in_time(command, tmp_path):
    """SIGSTOP of one rank: the other times out, and torchrun ends both."""
    started = time.monotonic()
    bomb = {"event": "step 1-supervised 3", "signal": signal.SIGSTOP, "rank": 1}
    ran = cases.run([*command, str(tmp_path / "run"), "--timeout-minutes", "0.2"], bomb=bomb,
                    fired=tmp_path / "fired", ranks=2, timeout=150)
    assert ran.returncode != 0 and (tmp_path / "fired").exists()
    assert time.monotonic() - started < 120


@pytest.mark.dist
def test_second_run_on_the_same_folder_is_refused(command, tmp_path):
    bomb = {"event": "step 1-supervised 0", "signal": signal.SIGSTOP, "rank": 0}
    first = subprocess.Popen([sys.executable, cases.WORKER, "", json.dumps(bomb), str(tmp_path / "fired"),
                              *command, str(tmp_path / "run")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "fired").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = cases.run([*command, str(tmp_path / "run")])
        assert second.returncode == 2 and f"process {first.pid} on " in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
    finally:
        first.kill()
        first.wait(20)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_full_disk_keeps_the_last_checkpoint(command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # last.pt with momentum is 2 x 51 MB: a third file of that size, half written, does not fit.
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=230m", "tmpfs", str(disk)],
                             capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        ran = cases.run([*command, str(disk / "run"), "--method", "supervised"])
        assert ran.returncode == 2, ran.stderr
        assert "make room" in ran.stderr and "Traceback" not in ran.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)
