"""What a checkpoint costs a training step: stall and slower steps while the file is written.

    python benchmarks/bench_checkpoint.py --out benchmarks/results/checkpoint-cpu.jsonl

Rows: milliseconds of 20 steps of the CamVid recipe on a batch in memory, without and with one checkpoint among them. Summary:
`checkpoint.overhead_pct`, the share of time that a checkpoint every 200 steps takes.
"""

import tempfile
from pathlib import Path

import torch

from harness import Report, arguments
from stpp import checkpoint
from stpp.config import Config, load_recipe
from stpp.data.sample import Batch, Sample
from stpp.distributed import World
from stpp.train import Schedule, Trainer

RECIPE = Path(__file__).parents[1] / "launch" / "recipes" / "camvid_stpp.toml"
CLASSES, STEPS, PERIOD = 11, 20, 200


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    report, config = Report(options), load_recipe(Config, RECIPE)
    crop, count = config.augment.crop_px, config.train.batch_global
    device = torch.device(options.device)
    images = torch.randn(count, 3, crop, crop, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (count, crop, crop), dtype=torch.uint8, device=device)
    batch = Batch(images_NCHW=images, labels_NHW=labels, indices=None)
    sample = Sample(key="none", image="none", mask="none", width=crop, height=crop)
    with tempfile.TemporaryDirectory() as name, checkpoint.Writer() as writer:
        trainer = Trainer(config, World(device=device), [sample] * count, stage=1, title="bench", folder=Path(name),
                          classes=tuple(map(str, range(CLASSES))), schedule=Schedule(steps=1 << 30, validate_steps=1 << 30),
                          validate=None)
        trainer.writer = writer

        def steps(save: bool) -> None:
            for number in range(STEPS):
                trainer.train_step([batch])
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
