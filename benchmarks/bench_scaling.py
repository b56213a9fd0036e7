"""Training on one and two ranks with the same images per rank, and an estimate to 64 ranks from the measured
parts.

    python benchmarks/bench_scaling.py --out benchmarks/results/scaling-cpu.jsonl

Every rank has one GPU, or on a CPU one thread. Rows: milliseconds a step. Summaries:
`scaling.two_ranks_efficiency` (images a second of two ranks over twice those of one), the time of
all-reducing the gradients alone, and for 4 to 64 ranks the estimated efficiency: the measured cost of the
second rank plus the bytes that a longer ring sends, over links as fast as the measured one and without
overlap.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness import Report, arguments, bare_trainer, random_batch
from stpp import distributed
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig

CLASSES, WARM_UP = 21, 3
MODEL = {"backbone": "resnet18", "output_stride": 16}


def rank(out: str, device: str, crop: str, per_rank: str, rounds: str) -> None:
    """Times the steps of one rank; rank 0 writes them, with the time of an all-reduce of the gradients
    alone."""
    crop, per_rank, rounds = int(crop), int(per_rank), int(rounds)
    with distributed.world(device) as here, tempfile.TemporaryDirectory() as name:
        if here.device.type == "cpu":
            torch.set_num_threads(1)
        config = Config(data=DataConfig(root=Path(name)), out=Path(name), model=ModelConfig(**MODEL),
                        augment=AugmentConfig(crop_px=crop),
                        train=TrainConfig(batch_global=per_rank * here.size))
        trainer = bare_trainer(config, here, Path(name), CLASSES)
        batch = random_batch(per_rank, crop, CLASSES, here.device)
        step_ms = timed(lambda: trainer.train_step([(batch,)]), here.device, rounds)
        gradients = torch.zeros(sum(weight.numel() for weight in trainer.step.network.parameters()),
                                device=here.device)
        reduce_ms = timed(lambda: distributed.sum_over_ranks(gradients), here.device, rounds)
        if here.is_main:
            Path(out).write_text(json.dumps({"step_ms": step_ms, "reduce_ms": reduce_ms,
                                             "bytes": gradients.nbytes}))


def timed(action, device: torch.device, rounds: int) -> list[float]:
    """Returns the milliseconds of each call after a warm-up."""
    found = []
    for number in range(WARM_UP + rounds):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            found.append(1000 * (time.perf_counter() - began))
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--crop", type=int, default=161, help="pixels")
    parser.add_argument("--per-rank", type=int, default=4, help="images per rank and step")
    options = parser.parse_args()
    options.threads = options.threads or (0 if options.device == "cuda" else 1)
    report, turns = Report(options), 3
    found = {ranks: {"step_ms": [], "reduce_ms": []} for ranks in (1, 2)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for ranks in found:
                out = Path(folder) / f"{ranks}.json"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(ranks), __file__, "--rank", str(out), options.device,
                           *map(str, (options.crop, options.per_rank, options.rounds))]
                subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                parts = json.loads(out.read_text())
                for key in found[ranks]:
                    found[ranks][key] += parts[key]
    median = {(ranks, key): sorted(values)[len(values) // 2] for ranks, parts in found.items() for key,
              values in parts.items()}
    shape = f"{options.per_rank},3,{options.crop},{options.crop}"
    for ranks, parts in found.items():
        report.measured("scaling.step", f"{ranks} ranks", shape, "auto", parts["step_ms"])
    alone, two, reduce_ms = median[1, "step_ms"], median[2, "step_ms"], median[2, "reduce_ms"]
    report.summary("scaling.two_ranks_efficiency", alone / two)
    report.summary("scaling.all_reduce_ms", reduce_ms)
    for ranks in (4, 8, 16, 32, 64):
        more_ms = reduce_ms * (2 * (ranks - 1) / ranks - 1)  # of two ranks: each byte passes once
        report.summary(f"scaling.paper_efficiency_{ranks}", alone / (two + more_ms))
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        main()
