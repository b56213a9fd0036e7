"""`stpp label` under torchrun: killed and stopped ranks, more and fewer ranks; and the command line."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import label_cases as cases
from conftest import torchrun
from stpp import checkpoint, cli
from stpp.inference import predictors
from stpp.label import rows, sinks
from stpp.models.build import build_model

RANK = str(Path(__file__).parents[1] / "faults" / "label_rank.py")
TEACHER = str(Path(RANK).parent)
"""Existing path that is no checkpoint with stored rules."""
IMAGES = 24
OPTIONS = ["--shard-size", "4", "--tta", "none", "--device", "cpu", "--compute-threads", "1", "--threads",
           "1",
           "--loader", "reference", "--batch-per-rank", "3", "--max-bad-fraction", "0.1"]
COMMITS = {
    "the plan of a shard is synced": "fsync */plan/.part-*.tmp",
    "the plan of a shard takes its name": "replace */plan/part-*.parquet",
    "a mask takes its name": "replace */masks/*.png",
    "the masks are synced": "sync",
    "the rows are synced": "fsync */labels/.part-*.tmp",
    "the rows take their name": "replace */labels/part-*.parquet",
    "the folder of rows is synced": "fsync */labels",
    "the marker is synced": "fsync */shards/.*.done.json.*.tmp",
    "the marker takes its name": "replace */shards/*.done.json",
    "the folder of markers is synced": "fsync */shards",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return cases.as_folder(tmp_path_factory.mktemp("ranks") / "in",
                           cases.good_files(IMAGES - 1) | {"two/bad.jpg": b"no image"})


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    return ["label", "--teacher", TEACHER, "--source", str(source), "--out", str(out), *OPTIONS, *more]


def label(ranks: int, source: Path, out: Path, *more: str,
          trap=("none", "", "0", "")) -> subprocess.CompletedProcess:
    given = [RANK, *map(str, trap), *arguments(source, out, *more)]
    if ranks:
        return torchrun(ranks, *given)
    return subprocess.run([sys.executable, *given], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = label(0, source, out)
    assert done.returncode == 0, done.stderr
    found = cases.contents(out)
    assert len([name for name in found if name.startswith("masks/")]) == IMAGES - 1
    assert [row["key"] for row in rows.read(out / "failed.parquet")] == ["two/bad"]
    return found


@pytest.mark.dist
def test_two_ranks_write_the_same_as_one(source, undisturbed, tmp_path):
    done = label(2, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert cases.contents(tmp_path / "out") == undisturbed
    assert f"{IMAGES} in this call" in done.stdout and f"{IMAGES - 1} images, 1 bad" in done.stdout
    assert done.stdout.count("images/s") == 1


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMMITS)), ids=list(COMMITS))
def test_rank_killed_at_a_commit_loses_nothing(source, undisturbed, tmp_path, number):
    out, who = tmp_path / "out", tmp_path / "pid"
    killed = label(2, source, out, trap=("kill", list(COMMITS.values())[number], 2, who))
    assert who.exists() and killed.returncode != 0, killed.stderr
    marked = len(list((out / "shards").glob("*.done.json"))) if (out / "shards").exists() else 0
    assert marked < IMAGES // 4
    again = label((1, 2, 3)[number % 3], source, out)
    assert again.returncode == 0, again.stderr
    keys = [row["key"] for row in rows.read_parts(out, "labels")]
    assert len(keys) == len(set(keys)) == IMAGES
    assert cases.contents(out) == undisturbed


@pytest.mark.dist
@pytest.mark.slow
def test_stopped_rank_delays_no_other(source, undisturbed, tmp_path):
    out, who = tmp_path / "out", tmp_path / "pid"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", RANK,
               "stop",
               "replace */masks/*.png", "2", str(who), *arguments(source, out)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    try:
        end = time.monotonic() + 90
        while not (out / "summary.json").exists():
            assert time.monotonic() < end and job.poll() is None, "the others did not end"
            time.sleep(0.2)
        stopped = int(who.read_text())
        assert "T" in Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0]
        assert json.loads((out / "summary.json").read_text())["images"] == IMAGES
        found = cases.contents(out)
        assert found == undisturbed
        os.kill(stopped, signal.SIGCONT)
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 0, errors
        assert cases.contents(out) == undisturbed
    finally:
        if job.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(who.read_text()), signal.SIGKILL)
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_restarts_killed_ranks(source, undisturbed, tmp_path, monkeypatch):
    # Otherwise new ranks may read the old ones' gloo addresses from the store that torchrun keeps, and never
    # connect.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    out, who = tmp_path / "out", tmp_path / "pid"
    done = torchrun(2, "--max-restarts", "2", RANK, "kill", "sync", "2", str(who), *arguments(source, out))
    assert who.exists() and done.returncode == 0, done.stderr
    assert cases.contents(out) == undisturbed


def test_bad_images_and_mistakes_have_their_exit_codes(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predictors, "from_paths",
                        lambda paths, device, **_: predictors.already_open(cases.Tiny(), identity="tiny"))

    def code_of(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments(source, tmp_path / "out", *more))
        return ended.value.code, capsys.readouterr().err

    code, errors = code_of("--max-bad-fraction", "0.01")
    assert code == 1 and "1 of 24 images are bad" in errors and "failed.parquet" in errors
    assert (tmp_path / "out" / "summary.json").exists()
    for more, words in ((["--min-confidence", "1.5"], "--min-confidence is 1.5"),
                        (["--part", "3/2"], "--part 3/2"), (["--tta", "flip"], "tta: none -> flip"),
                        (["--source", str(tmp_path / "no")], "no such folder"),
                        (["--out", str(source / "masks")], "is inside --source"),
                        (["--teacher", "no.pt"], "no.pt"),
                        (["--max-bad-fraction", "2"], "--max-bad-fraction"),
                        (["--out", RANK], "choose another --out")):
        code, errors = code_of(*more)
        assert code == 2 and words in errors, (more, errors)
        assert len([line for line in errors.splitlines() if line.startswith("stpp: ")]) == 1


def test_source_can_be_listed_first(source, undisturbed, tmp_path, monkeypatch, capsys):
    def opened(*_, **__):
        raise AssertionError("no network is needed to list")

    monkeypatch.setattr(predictors, "from_paths", lambda paths, device, **_: opened)
    cli.main(arguments(source, tmp_path / "out", "--list-only"))
    assert f"{IMAGES} images listed, 6 shards to do" in capsys.readouterr().out
    # The names of the classes stand in run.json.
    network = predictors.OpenedPredictor(network=cases.Tiny(), identity="tiny", classes=tuple("abcd"))
    monkeypatch.setattr(predictors, "from_paths", lambda paths, device, **_: lambda images: [network])
    cli.main(arguments(source, tmp_path / "out"))
    assert cases.contents(tmp_path / "out") == undisturbed


def test_full_disk_is_one_line_with_its_own_exit_code(source, tmp_path, monkeypatch, capsys):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(predictors, "from_paths",
                        lambda paths, device, **_: predictors.already_open(cases.Tiny(), identity="tiny"))
    monkeypatch.setattr(sinks, "encode", no_room)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments(source, tmp_path / "out"))
    finally:
        torch.set_num_threads(threads)
    errors = capsys.readouterr().err
    assert ended.value.code == 1 and "No space left" in errors and "run the same command again" in errors


@pytest.mark.dist
@pytest.mark.slow
def test_mistake_found_by_the_first_rank_ends_all(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("{}")
    refused = label(2, source, tmp_path / "out")
    assert refused.returncode != 0
    assert len([line for line in refused.stderr.splitlines() if line.startswith("stpp: ")]) == 1


@pytest.mark.dist
def test_rank_with_different_results_ends_all(source, tmp_path, monkeypatch):
    monkeypatch.setenv("STPP_TEST_OTHER_RANK", "1")
    refused = label(2, source, tmp_path / "out")
    assert refused.returncode != 0 and "teacher: tiny -> other" in refused.stderr


@pytest.mark.dist
def test_command_labels_with_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    paths = []
    for i in range(3):
        path = tmp_path / f"third-{i}.pt"
        checkpoint.save(path, model=build_model("deeplabv3plus", "resnet18", 4, 16).state_dict(),
                        classes=list("abcd"),
                        architecture={"name": "deeplabv3plus", "backbone": "resnet18", "output_stride": 16})
        paths.append(str(path))
    source = cases.as_tar(tmp_path / "s.tar",
                          cases.good_files(4) | {"odd/pixel.png": cases.odd_files()["odd/pixel.png"]})
    command = [sys.executable, "-m", "stpp"]
    done = subprocess.run([*command, "label", "--teacher", paths[0], "--source", source, "--out",
                           tmp_path / "out",
                           "--tta", "flip"],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "5 images, 0 bad" in done.stdout and "compute" in done.stdout and "(ignored)" in done.stdout
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 5
    done = subprocess.run([*command, "select", "--checkpoints", *paths, "--source", source, "--out",
                           tmp_path / "sel"],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lists = [(tmp_path / "sel" / name).read_text().splitlines()
             for name in ("reliable_ids.txt", "unreliable_ids.txt")]
    assert [len(lines)
            for lines in lists] == [2, 3] and all(line.startswith("s.tar::") for line in sum(lists, []))


@pytest.mark.dist
def test_verify_waits_until_every_shard_is_checked(source, undisturbed, tmp_path):
    """The last shard, which is damaged, is checked slowly."""
    out = tmp_path / "out"
    assert label(0, source, out).returncode == 0
    last = sorted(row["key"] for row in rows.read(rows.part(out, "labels", 5)) if row["status"] == "ok")[-1]
    (out / "masks" / f"{last}.png").write_bytes(b"x")
    done = label(2, source, out, "--verify", trap=("slow", "5", "2", ""))
    assert done.returncode == 0, done.stderr
    assert f"{last}.png has 1 bytes" in done.stderr
    assert cases.contents(out) == undisturbed
