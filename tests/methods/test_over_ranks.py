"""UniMatch and UniMatch-V2 take the same steps in one process, on two ranks, and in two passes a step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import torchrun

WORKER = str(Path(__file__).parents[1] / "workers" / "steps.py")
STEPS = "3"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("method", "rare"), [("unimatch", ""), ("unimatch-v2", ""), ("unimatch", "rare"),
                                              ("unimatch-v2", "rare"), ("supervised", "rare")])
def test_ranks_and_passes_take_the_same_steps_as_one_process(method, rare, synthetic, synthetic_index,
                                                             tmp_path):
    args, more = [str(synthetic), str(synthetic_index)], [method, *([rare] if rare else [])]

    def results(name: str) -> dict:
        return torch.load(tmp_path / f"{name}.pt")

    ran = subprocess.run([sys.executable, WORKER, *args, tmp_path / "alone.pt", "1", STEPS, *more],
                         capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    alone = results("alone")
    terms = torch.tensor(alone["losses"]).view(int(STEPS), -1)
    if method == "supervised":
        assert (terms > 0).all() and alone["confident"] is None
    else:  # the last is the confident share
        share = terms[:, -1]
        assert (terms[:, :-1] > 0).all() and share.min() > 0.05 and share.max() <= 1 and share.mean() < 1
        assert sum(alone["confident"]) > 1000
    for name, accumulate in (("ranks", "1"), ("passes", "2")):
        ran = torchrun(2, WORKER, *args, str(tmp_path / f"{name}.pt"), accumulate, STEPS, *more)
        assert ran.returncode == 0, ran.stderr
        torch.testing.assert_close(torch.tensor(results(name)["losses"]), torch.tensor(alone["losses"]),
                                   rtol=1e-4, atol=1e-6)
        close = pytest.approx(alone["confident"], abs=20) if alone["confident"] else None
        assert results(name)["confident"] == close  # rounding may move a pixel across the threshold
        for key, value in alone["weights"].items():
            torch.testing.assert_close(results(name)["weights"][key], value, rtol=1e-4, atol=1e-6, msg=key)
