"""What a process claims of its machine before it computes."""

import os
import platform
import subprocess
import sys

import pytest

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
def test_freed_memory_is_kept_unless_the_user_set_it_up(variables, kept):
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=120, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 150) == kept
