"""The demonstration: a synthetic data set, and ST++ on it under torchrun."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

from stpp import files
from stpp.commands import synthetic
from stpp.config import AugmentConfig, Config, DataConfig, LabelConfig, ModelConfig, TrainConfig, load_recipe, to_dict
from stpp.errors import UserError

RANKS = 2
DEMO = Config(
    method="stpp",
    data=DataConfig(layout="voc", fraction="12"),
    model=ModelConfig(backbone="resnet18", output_stride=32),
    augment=AugmentConfig(crop_px=49, long_side=(36, 104)),
    label=LabelConfig(tta="stpp"),
    train=TrainConfig(epochs=12, supervised_epochs=160, batch_global=16, lr=0.05, head_lr_multiplier=1.0,
                      validate_every=160),
)
"""Few labels, many steps of a small network: what two cores can do in five minutes."""


def demo(out: Path, *, seed: int, control: bool) -> None:
    """Generates the data below `out/data` and trains in `out/run`.

    Raises:
        UserError: `out` holds another demo.
        SystemExit: with torchrun's exit code, when the training failed.
    """
    root, recipe_path = out / "data", out / "recipe.json"
    recipe = dataclasses.replace(DEMO, seed=seed, data=dataclasses.replace(DEMO.data, split_seed=seed))
    if recipe_path.exists() and load_recipe(Config, recipe_path) != recipe:
        raise UserError(f"--out {out} holds a demo of another seed or version; choose another --out")
    files.write_json(recipe_path, to_dict(recipe))
    if not root.exists():
        print(f"demo: drawing a data set in {root}", file=sys.stderr)
        partial = out / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        synthetic.generate(partial, seed=seed)
        partial.rename(root)
    train = ["-m", "stpp", "train", "--recipe", str(recipe_path), "--data.root", str(root), "--out",
             str(out / "run")] + ["--control"] * control
    if code := torchrun(train):
        sys.exit(code)


def torchrun(train: list[str]) -> int:
    """Runs `python TRAIN` on two ranks, but never on more than there are GPUs where there are any; returns torchrun's exit code."""
    import torch

    ranks = min(RANKS, torch.cuda.device_count() or RANKS)
    print(f"demo: torchrun --nproc-per-node {ranks} {' '.join(train)}", file=sys.stderr)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
                           *train], check=False).returncode
