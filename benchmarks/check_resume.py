"""Resume after SIGTERM against an uninterrupted run: weights equal bit for bit.

    python benchmarks/check_resume.py --out benchmarks/results/last.jsonl

Three runs of one small recipe under torchrun, one process each, with --deterministic: two to their end, and
one that gets SIGTERM after its first checkpoint and is then started again by the same command. All three must
end with equal weights, momentum and step: the first two show that a run is repeatable, the third that an
interruption leaves no trace. On a GPU they run concurrently, on a CPU one after the other. Summaries:
`resume.repeats`, `resume.equal` (1: equal), `resume.stopped_at_step` of `resume.steps`; the script fails if
either is 0.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from harness import Report, arguments
from stpp import checkpoint
from stpp.commands import synthetic

LIMIT_S = 240
STAGE = "stages/1-supervised"
SMALL = {"epochs": 2, "crop": 33, "stride": 32}


def command(options: argparse.Namespace, data: Path, out: Path) -> list[str]:
    """Builds the command line of a run."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m",
            "stpp", "train",
            "--method", "supervised", "--deterministic", "--device", options.device.partition(":")[0],
            "--data.root", str(data), "--data.layout", "voc", "--data.fraction", "16",
            "--model.backbone", "resnet18", "--model.output-stride", str(options.stride), "--augment.crop-px",
            str(options.crop),
            "--augment.long-side", "48", "104", "--train.epochs", str(options.epochs), "--train.batch-global",
            "4",
            "--train.lr", "0.02", "--train.validate-min-steps", "1000000", "--train.checkpoint-steps", "2",
            "--out", str(out)]


def run(arguments: list[str], log: Path, *, stop_after: Path | None = None) -> None:
    """Runs to the end, and adds the output to `log`; with `stop_after`, sends SIGTERM once that file exists.

    Raises:
        RuntimeError: it ended otherwise, or not within `LIMIT_S`.
    """
    with log.open("a") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + LIMIT_S
    try:
        while (
            stop_after is not None
            and process.poll() is None
            and not stop_after.exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        if stop_after is not None and process.poll() is None:
            process.terminate()
        code = process.wait(max(1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a run took more than {LIMIT_S} s") from None
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its ranks, which it could not after SIGKILL
            process.wait()
    if bool(code) == (stop_after is None):
        raise RuntimeError(f"a run ended with {code}"
                           + (", before SIGTERM" if stop_after else ""))


def stopped(arguments: list[str], out: Path, log: Path) -> int:
    """Runs until the first checkpoint, stops, and runs again; returns the saved step."""
    run(arguments, log, stop_after=out / STAGE / "last.pt")
    step = checkpoint.load(out / STAGE / "last.pt")["step"]
    run(arguments, log)
    return step


def equal_content(first: object, second: object) -> bool:
    """Compares the contents of checkpoints bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_content(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal_content, first, second))
    return first == second


def state(out: Path) -> dict:
    """Reads the state after the last step: weights, momentum, step number."""
    saved = checkpoint.load(out / STAGE / "last.pt")
    return {name: saved[name] for name in ("model", "optimizer", "step")}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--epochs", type=int, default=50, help="epochs of eight steps each")
    parser.add_argument("--crop", type=int, default=65, help="crop, pixels")
    parser.add_argument("--stride", type=int, default=16, help="output stride of the network")
    options = parser.parse_args()
    report = Report(options)
    # one thread a run: two threads on a busy machine wait for each other at every barrier
    if report.device.type == "cpu":
        os.sched_setaffinity(0, [random.choice(sorted(os.sched_getaffinity(0)))])
    # Deterministic cuBLAS needs this before CUDA starts, whatever the engine itself sets.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "data", train=24, val=2)
        outs = {kind: folder / kind for kind in ("stopped", "whole", "again")}
        lines = {kind: command(options, folder / "data", out) for kind, out in outs.items()}
        logs = {kind: folder / f"{kind}.txt" for kind in outs}
        try:
            with ThreadPoolExecutor(len(outs) if report.device.type == "cuda" else 1) as pool:
                step = pool.submit(stopped, lines["stopped"], outs["stopped"], logs["stopped"])
                others = [pool.submit(run, lines[kind], logs[kind]) for kind in ("whole", "again")]
                step, _ = step.result(), [other.result() for other in others]
        finally:
            for log in filter(Path.exists, logs.values()):
                print(log.read_text(errors="replace"), flush=True)
        states, text = {kind: state(out) for kind,
                        out in outs.items()}, logs["stopped"].read_text(errors="replace")
    report.summary("resume.steps", states["whole"]["step"])
    report.summary("resume.stopped_at_step", step)
    repeats, equal = (equal_content(states["whole"], states[kind]) for kind in ("again", "stopped"))
    report.summary("resume.repeats", float(repeats))
    report.summary("resume.equal", float(equal))
    report.finish()
    assert 0 < step < states["whole"]["step"], "the run ended before SIGTERM"
    assert re.search(rf"resuming from step {step}\b",
                     text), "the run did not resume from its checkpoint"
    assert repeats and equal, (
        f"two runs with --deterministic: equal {repeats}; interrupted and resumed: equal {equal}"
    )


if __name__ == "__main__":
    main()
