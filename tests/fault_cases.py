"""Runs that are killed and resumed many times, against an undisturbed one."""

import json
import random
import re
import secrets
import subprocess
import sys
from pathlib import Path

import torch

from stpp.label import rows

WORKER = str(Path(__file__).parent / "faults" / "bombed.py")
STAGES = ("1-supervised", "2-select", "3-label", "4-retrain", "5-label", "6-retrain")
RECIPE = """
method = "stpp"
deterministic = true
device = "cpu"
[data]
layout = "voc"
fraction = "8"
threads = 1
[model]
backbone = "resnet18"
output_stride = 32
[augment]
crop_px = 33
long_side = [32, 64]
[train]
epochs = 1
supervised_epochs = 3
batch_global = 4
lr = 0.02
precision = "fp32"
validate_every = 2
checkpoint_steps = 2
[label]
tta = "flip"
batch_per_rank = 2
shard_size = 4
backend = "eager"
"""


def run(command: list[str], *, events: Path | str = "", bomb: dict | None = None, fired: Path | str = "",
        ranks: int = 1, restarts: int = 0, timeout: float = 280) -> subprocess.CompletedProcess:
    """Runs `stpp` with the arguments `command`, in one process or under torchrun, optionally with a bomb."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                  "--max-restarts", str(restarts)]
    return subprocess.run([*start, WORKER, str(events), json.dumps(bomb) if bomb else "", str(fired),
                           *command],
                          capture_output=True, text=True, timeout=timeout)


def contents(out: Path) -> dict:
    """Returns all content that must not depend on the number of deaths, by its name in the run directory."""
    found = {}
    for path in sorted((out / "stages").rglob("*")):
        name = str(path.relative_to(out / "stages"))
        if path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            found[name] = {key: value for key, value in saved.items() if key != "seconds"}
        elif path.suffix in (".png", ".txt"):
            found[name] = path.read_bytes()
        elif path.suffix == ".parquet" and "plan" not in path.parts:
            found[name] = rows.read(path)
        elif path.name == "metrics.jsonl":
            found[name] = [row for line in path.read_text().splitlines()
                           if "miou_pct" in (row := json.loads(line))]
    results = json.loads((out / "results.json").read_text())
    found["results"] = [{key: value for key, value in stage.items() if key != "seconds"}
                        for stage in results["stages"]]
    return found


def differing(first: dict, second: dict) -> list[str]:
    """Returns the names whose content differs."""
    return [name for name in sorted(first.keys() | second.keys())
            if name not in first or name not in second or not same(first[name], second[name])]


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(same(first[key], second[key]) for key in first)
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def chosen(events: list[str], count: int, seed: int) -> list[str]:
    """Chooses `count` events in the order of the run, at least two of each stage."""
    draw = random.Random(seed)
    of_stage = [[i for i, event in enumerate(events) if re.match(rf"\w+ {stage}[ /]", event)]
                for stage in STAGES]
    kept = {i for positions in of_stage for i in draw.sample(positions, 2)}
    rest = [i for i in range(len(events)) if i not in kept]
    return [events[i] for i in sorted(kept | set(draw.sample(rest, min(count - len(kept), len(rest)))))]


def ended_by(ran: subprocess.CompletedProcess, number: int) -> bool:
    """Returns True if the signal ended the process, immediately or after saving."""
    return ran.returncode in (-number, 128 + number)


def finish(command: list[str], folder: Path, events: list[str], number: int) -> int:
    """Dies at each event in turn, then runs to the end.

    Returns:
        Number of deaths.
    """
    for event in events:
        # an existing one would keep the bomb from going off
        fired = folder / f"fired-{secrets.token_hex(8)}"
        ran = run(command, bomb={"event": event, "signal": number, "rank": 0}, fired=fired)
        assert fired.exists() and ended_by(ran, number), (
            f"{event}: exit {ran.returncode}\n{ran.stderr[-2000:]}"
        )
    ran = run(command)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return len(events)
