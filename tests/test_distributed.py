"""One process among others: its use of the machine, and ranks that wait for the first."""

import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import torchrun
from stpp import distributed

WORKER = str(Path(__file__).parent / "workers" / "on_main.py")

HELD = """
import torch
from pathlib import Path
from stpp import distributed

def resident_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

distributed.keep_freed_memory()
before = resident_mib()
large = torch.ones(200 * 1024 * 1024 // 4)
del large
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_MMAP_MAX_": "65536"}, False)])
def test_freed_memory_is_kept_unless_configured_by_the_user(variables, kept):
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120,
                          env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 150) == kept


def without_torchrun(case: str) -> list[tuple[int, str, str]]:
    """Runs two ranks that find each other by the environment alone; returns exit code and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, WORKER, case], env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *each) for rank, each in zip(ranks, said, strict=True)]


def said(output: str) -> list[str]:
    """Sorts the messages of the ranks; a line of one rank may end after the start of another's."""
    return sorted(re.findall(r"rank \d (?:counts \[.*?\]|ends)", output))


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_wait_for_the_first_longer_than_for_a_collective():
    ran = torchrun(2, WORKER, "slow")
    assert ran.returncode == 0, ran.stderr
    assert said(ran.stdout) == ["rank 0 ends", "rank 1 ends"]


@pytest.mark.dist
@pytest.mark.slow
def test_failure_of_first_rank_ends_all_and_is_reported_once():
    ran = torchrun(2, WORKER, "failing")
    assert ran.returncode != 0 and "went on" not in ran.stdout
    assert ran.stderr.count("stpp: the data is not there") == 1

    (first_code, _, first_errors), (code, out, errors) = without_torchrun("failing")
    assert (first_code, code) == (2, 2) and "stpp: the data is not there" in first_errors
    assert "Traceback" not in errors and "the data" not in errors and out == ""


@pytest.mark.dist
@pytest.mark.slow
def test_each_call_has_its_own_store_prefix():
    ran = torchrun(2, WORKER, "parts")
    outputs = [ran.stdout, "".join(out for _, out, _ in without_torchrun("parts"))]
    for output in outputs:
        assert said(output) == ["rank 0 counts [2, 2, 2]", "rank 0 ends", "rank 1 counts [2, 2, 2]",
                                "rank 1 ends"]


def test_single_process_runs_the_action():
    here, done = distributed.World(device=torch.device("cpu")), []
    distributed.on_main(here, lambda: done.append(1))
    assert done == [1] and distributed.call_store(here) is None
    with pytest.raises(KeyError):
        distributed.on_main(here, lambda: {}["absent"])


@pytest.mark.parametrize("limit, ranks, expected", [
    ("", 1, 4), ("1", 1, 1), ("3", 1, 3), ("9", 1, 4), ("0", 1, 4), ("2,1", 1, 4), ("1", 2, 2), ("", 8, 1)])
def test_one_process_computes_with_the_threads_of_the_environment(monkeypatch, limit, ranks, expected):
    """torchrun sets OMP_NUM_THREADS to 1 for several ranks, so then it says nothing of the user's wish."""
    monkeypatch.setattr(distributed.processes, "cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert distributed._compute_threads(ranks) == expected
