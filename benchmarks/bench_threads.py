"""Training steps on a CPU, alone and beside one busy process, by threads and by the waiting of OpenMP.

    python benchmarks/bench_threads.py --out benchmarks/results/threads-cpu-bf16.jsonl

Every variant runs in a process of its own. Rows: milliseconds a step. Summaries:
`threads.slowdown_alone.VARIANT`, `threads.slowdown_beside_a_process.VARIANT`, against all threads alone.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from harness import Report, arguments, bare_trainer, call_ms, random_batch
from stpp import distributed, processes
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig

CLASSES, WARM_UP = 21, 3
TURNS = 3


def steps(out: str, crop: str, batch: str, rounds: str) -> None:
    """Times training steps with the threads that the environment sets."""
    with distributed.world("cpu") as here, tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        config = Config(data=DataConfig(root=Path(name)), out=Path(name),
                        model=ModelConfig(backbone="efficientnet-lite0", output_stride=16),
                        augment=AugmentConfig(crop_px=int(crop)), train=TrainConfig(batch_global=int(batch)))
        trainer = bare_trainer(config, here, Path(name), CLASSES)
        images = random_batch(int(batch), int(crop), CLASSES, here.device)
        times_ms = [call_ms(lambda: trainer.train_step([(images,)]), here.device)
                    for _ in range(WARM_UP + int(rounds))]
    Path(out).write_text(json.dumps(times_ms[WARM_UP:]))


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Another process that computes on one core all the time, if wanted."""
    if not wanted:
        yield
        return
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], {"rounds": 1, "crop": 33, "batch": 2})
    parser.add_argument("--crop", type=int, default=161, help="pixels")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    options = parser.parse_args()
    report, count = Report(options), max(processes.cores(), 2)
    variants = {f"{count} threads": (count, "active"), f"{count} threads, passive": (count, "passive"),
                "1 thread": (1, "active")}
    times_ms = {(label, busy): [] for label in variants for busy in (False, True)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        for _ in range(1 if options.small else TURNS):
            for label, busy in times_ms:
                threads, waiting = variants[label]
                command = [sys.executable, __file__, "--steps", str(out),
                           *map(str, (options.crop, options.batch, options.rounds))]
                with busy_process(busy):
                    subprocess.run(command, check=True, env=os.environ | {
                        "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": waiting})
                times_ms[label, busy] += json.loads(out.read_text())
    shape = f"{options.batch},3,{options.crop},{options.crop}"
    median = {}
    for (label, busy), times in times_ms.items():
        name = "threads.step.beside_a_process" if busy else "threads.step.alone"
        median[label, busy] = report.measured(name, label, shape, "auto", times)["median"]
    for label, busy in times_ms:
        name = "threads.slowdown_beside_a_process" if busy else "threads.slowdown_alone"
        report.summary(f"{name}.{label}", median[label, busy] / median[f"{count} threads", False])
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--steps"]:
        steps(*sys.argv[2:])
    else:
        main()
