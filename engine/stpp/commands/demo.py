"""`stpp demo`: a synthetic data set, and a training run on it under torchrun. Heavy imports are deferred."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stpp import config, files
from stpp.config import (
    AugmentConfig,
    Config,
    ConsistencyConfig,
    DataConfig,
    ModelConfig,
    StageLabelConfig,
    TrainConfig,
)
from stpp.errors import UserError

RANKS = 2
DEMO = Config(
    method="stpp",
    data=DataConfig(layout="voc", fraction="12"),
    model=ModelConfig(backbone="resnet18", output_stride=32),
    augment=AugmentConfig(crop_px=49, long_side=(36, 104)),
    label=StageLabelConfig(tta="stpp"),
    train=TrainConfig(epochs=12, supervised_epochs=160, batch_global=16, lr=0.05, head_lr_multiplier=1.0,
                      validate_every=160),
)
"""Few labels and many steps of a small network: three minutes on two cores with bf16."""
ONE_STAGE = dataclasses.replace(
    DEMO, consistency=ConsistencyConfig(confidence=0.95),
    train=dataclasses.replace(DEMO.train, epochs=9, supervised_epochs=None, batch_global=8, validate_every=9))
"""The same images and network. Each unlabelled crop is seen in three views per step, so this recipe has half
as many steps as ST++."""
DEMOS = {"stpp": DEMO} | {method: dataclasses.replace(ONE_STAGE, method=method)
                          for method in ("unimatch", "unimatch-v2", "fixmatch")}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Generate a small synthetic data set and train ST++, or another method, on it with two processes."""

    out: Path
    """Folder of the run."""
    method: Literal["stpp", "unimatch", "unimatch-v2", "fixmatch"] = "stpp"
    """ST++ in six stages, or a single-stage method; see docs/unimatch.md."""
    seed: int = 0
    """Seed of the data, the split and the training."""
    small: bool = False
    """A tenth of the training, to try an installation in a minute; its scores mean nothing."""
    control: bool = False
    """Also train on the labels only, for as many steps as the last stage."""


def demo(args: Sequence[str]) -> None:
    """Runs `stpp demo`: generates the data in `out/data` and trains in `out/run`.

    Raises:
        UserError: `out` holds another demo.
        SystemExit: torchrun's exit code, if the training failed.
    """
    options = config.parse(Demo, args, prog="stpp demo")
    out, seed = options.out, options.seed
    root, recipe_path = out / "data", out / "recipe.json"
    chosen = smaller(DEMOS[options.method]) if options.small else DEMOS[options.method]
    recipe = dataclasses.replace(chosen, seed=seed, data=dataclasses.replace(chosen.data, split_seed=seed))
    if recipe_path.exists() and config.load_recipe(Config, recipe_path) != recipe:
        raise UserError(f"--out {out} holds a demo of another method, size, seed or version; "
                        "choose another --out")
    files.write_json(recipe_path, config.to_dict(recipe))
    if not root.exists():
        from stpp.commands import synthetic

        print(f"demo: generating a data set in {root}", file=sys.stderr)
        partial = out / "data.partial"
        shutil.rmtree(partial, ignore_errors=True)
        synthetic.generate(partial, seed=seed)
        partial.rename(root)
    train = ["-m", "stpp", "train", "--recipe", str(recipe_path), "--data.root", str(root), "--out",
             str(out / "run")] + ["--control"] * options.control
    if code := torchrun(train):
        sys.exit(code)


def smaller(recipe: Config) -> Config:
    """The recipe with a tenth of its epochs."""
    epochs, supervised = recipe.train.epochs, recipe.train.supervised_epochs
    return dataclasses.replace(recipe, train=dataclasses.replace(
        recipe.train, epochs=max(epochs // 10, 1), supervised_epochs=supervised and supervised // 10))


def torchrun(train: list[str]) -> int:
    """Runs `python TRAIN` on two ranks, or one per GPU if there are fewer; returns torchrun's exit code."""
    import torch

    ranks = min(RANKS, torch.cuda.device_count() or RANKS)
    print(f"demo: torchrun --nproc-per-node {ranks} {' '.join(train)}", file=sys.stderr)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(ranks), *train], check=False).returncode
