"""Cost of a checkpoint during training: stalls, and slower steps while the file is written.

    python benchmarks/bench_checkpoint.py --out benchmarks/results/checkpoint-cpu.jsonl

Rows: milliseconds of 20 steps of the CamVid recipe on a batch in memory, without and with one checkpoint.
Summary: `checkpoint.overhead_pct`, the share of time of a checkpoint every 200 steps.
"""

import dataclasses
import tempfile
from pathlib import Path

import torch

from harness import Report, arguments, bare_trainer, random_batch
from stpp import checkpoint
from stpp.config import Config, load_recipe
from stpp.distributed import World

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "camvid_stpp.toml"
CLASSES, STEPS, PERIOD = 11, 20, 200


def main() -> None:
    recipe = load_recipe(Config, RECIPE)
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--crop", type=int, default=recipe.augment.crop_px,
                        help="pixels; default: the recipe's")
    options = parser.parse_args()
    report, crop, count = Report(options), options.crop, recipe.train.batch_global
    config = dataclasses.replace(recipe, augment=dataclasses.replace(recipe.augment, crop_px=crop))
    device = torch.device(options.device)
    batch = random_batch(count, crop, CLASSES, device)
    with tempfile.TemporaryDirectory() as name, checkpoint.CheckpointWriter() as writer:
        trainer = bare_trainer(config, World(device=device), Path(name), CLASSES)
        trainer.writer = writer

        def steps(save: bool) -> None:
            for number in range(STEPS):
                trainer.train_step([(batch,)])
                if save and number == 0:
                    trainer._save()
            writer.wait()

        dtype = str(trainer.autocast_dtype).removeprefix("torch.")
        rows = report.compare("checkpoint.steps", f"{STEPS} x {count},3,{crop},{crop}", dtype,
                              {"without": lambda: steps(False), "with": lambda: steps(True)})
    without_ms, with_ms = rows["without"]["median"], rows["with"]["median"]
    report.summary("checkpoint.cost_ms", with_ms - without_ms)
    report.summary("checkpoint.overhead_pct", 100 * (with_ms - without_ms) / (without_ms / STEPS * PERIOD))
    report.finish()


if __name__ == "__main__":
    main()
