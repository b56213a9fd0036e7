"""Shared settings of all tests: packages from the source roots, two threads, and the place of CamVid."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "engine"), str(ROOT / "kernels")]
sys.path[:0] = PATHS
# for processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
if not any(Path("/dev").glob("nvidia[0-9]*")):
    # read when a kernel is defined, so before any test imports its module
    os.environ.setdefault("TRITON_INTERPRET", "1")
# No test asserts a duration, because machines are shared. With CI set (.ci/run) the examples are always
# the same; otherwise each run draws others.
is_ci = "CI" in os.environ
settings.register_profile("stpp", deadline=None, derandomize=is_ci, **({"database": None} if is_ci else {}))
settings.load_profile("stpp")
CAMVID = ROOT.parent / "shared" / "data" / "camvid"


@pytest.fixture(scope="session")
def camvid() -> Path:
    """Folder of CamVid; skips if it is absent."""
    if not CAMVID.is_dir():
        pytest.skip(f"CamVid is not at {CAMVID}")
    return CAMVID


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Path:
    """Root of a synthetic set: 24 training and 6 validation images, 6 classes."""
    from stpp.commands import synthetic as generator

    root = tmp_path_factory.mktemp("synthetic") / "data"
    generator.generate(root, seed=3, train=24, val=6)
    return root


@pytest.fixture(scope="session")
def synthetic_index(synthetic, tmp_path_factory) -> Path:
    """Folder of the prepared index of `synthetic`."""
    from stpp.dataset import index

    folder = tmp_path_factory.mktemp("index")
    index.prepare(synthetic, folder, layout="voc", workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def listed(synthetic, tmp_path_factory) -> Path:
    """List of three images of `synthetic`."""
    names = (synthetic / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:3]
    path = tmp_path_factory.mktemp("list") / "val.txt"
    path.write_text("".join(f"JPEGImages/{name}.jpg SegmentationClass/{name}.png\n" for name in names))
    return path


@pytest.fixture(autouse=True)
def _threads():
    """Restores the number of threads, which commands set."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def torchrun(ranks: int, *args: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs a script or `-m module` on `ranks` processes of this machine, each with one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
               *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
