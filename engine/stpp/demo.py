"""The demonstration: a synthetic data set, and ST++ on it under torchrun."""

import dataclasses
import subprocess
import sys
from pathlib import Path

from stpp import files
from stpp.config import AugmentConfig, Config, DataConfig, LabelConfig, ModelConfig, TrainConfig, to_dict

RANKS = 2
DEMO = Config(
    method="stpp",
    data=DataConfig(layout="voc", fraction="1/8"),
    model=ModelConfig(backbone="resnet18", output_stride=16),
    augment=AugmentConfig(crop_px=97, long_side=(96, 192)),
    train=TrainConfig(epochs=6, supervised_epochs=30, batch_global=16, lr=0.02, head_lr_multiplier=1.0,
                      validate_every=2),
    label=LabelConfig(batch_per_rank=8),
)


def demo(out: Path, *, seed: int, control: bool) -> None:
    """Generates the data below `out/data` and trains in `out/run`.

    Raises:
        SystemExit: with torchrun's exit code, when the training failed.
    """
    from stpp.data import synthetic

    root = out / "data"
    if not (root / "classes.json").exists():
        print(f"demo: drawing a data set in {root}", file=sys.stderr)
        synthetic.generate(root, seed=seed)
    recipe = dataclasses.replace(DEMO, seed=seed, data=dataclasses.replace(DEMO.data, split_seed=seed))
    files.write_json(out / "recipe.json", to_dict(recipe))
    train = ["-m", "stpp", "train", "--recipe", str(out / "recipe.json"), "--data.root", str(root), "--out",
             str(out / "run")] + ["--control"] * control
    ranks = _ranks()
    print(f"demo: torchrun --nproc-per-node {ranks} {' '.join(train)}", file=sys.stderr)
    code = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                           *train], check=False).returncode
    if code:
        sys.exit(code)


def _ranks() -> int:
    """Two processes, but never more than GPUs where there are any."""
    import torch

    return min(RANKS, torch.cuda.device_count() or RANKS)
