"""Two processes on one run directory: the second is refused, a dead one is replaced."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from stpp.errors import UserError
from stpp.run import lease

HOLDER = """
import sys, time
from pathlib import Path
from stpp.run import lease
with lease.held(Path(sys.argv[1]), beat_s=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, beat_s: float = 0.1) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), str(beat_s)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n", process.communicate(timeout=20)[1]
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(20)
    process.stdout.close()
    process.stderr.close()


def claim(path, **changes) -> None:
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "machine": "another", "token": "t"} | changes))


def test_second_process_is_refused_with_the_first(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "), lease.held(tmp_path):
        pass
    end(process)
    with lease.held(tmp_path):  # killed on this machine
        assert json.loads((tmp_path / lease.NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / lease.NAME).exists()


def test_remote_holder_keeps_the_lease_until_its_heartbeat_expires(tmp_path):
    path = tmp_path / lease.NAME
    claim(path)
    with pytest.raises(UserError, match="process 1 on elsewhere"), lease.held(tmp_path):
        pass
    os.utime(path, (time.time() - 200, time.time() - 200))
    with lease.held(tmp_path):
        pass


def test_heartbeat_is_written(tmp_path):
    path = tmp_path / lease.NAME
    with lease.held(tmp_path, beat_s=0.05):
        os.utime(path, (1, 1))
        end_at = time.monotonic() + 10
        while path.stat().st_mtime < 2:
            assert time.monotonic() < end_at
            time.sleep(0.02)


def test_process_that_lost_its_lease_ends(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    path = tmp_path / lease.NAME
    os.utime(path, (time.time() - 200, time.time() - 200))
    with lease.held(tmp_path):
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 1
        assert "taken over" in process.stderr.read()
        assert path.exists()
    end(process)


def test_a_damaged_lease_is_replaced(tmp_path):
    (tmp_path / lease.NAME).write_text("{")
    with lease.held(tmp_path):
        pass


def test_reused_process_number_is_distinguished_by_machine(tmp_path):
    # alive here, but the lease is of another machine: refused by time alone
    claim(tmp_path / lease.NAME, pid=os.getpid())
    with pytest.raises(UserError, match="in use"), lease.held(tmp_path):
        pass


def test_impossible_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out"), lease.held(tmp_path / "file" / "run"):
        pass
