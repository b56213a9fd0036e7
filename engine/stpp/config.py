"""What a run is told: frozen dataclasses, filled from a recipe (TOML or JSON), then from the command line.

Flags are the field names: `train.epochs` in a recipe is `--train.epochs` on the command line. Every value passes
through tyro once, so that a recipe and a flag are checked by the same rules and answered with the same words.
"""

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from stpp.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Method = Literal["supervised", "st", "stpp"]
MAY_CHANGE = ("out", "control", "device", "timeout_minutes", "data.threads", "data.index", "profile",
              "train.checkpoint_steps", "train.checkpoint_minutes", "train.on_nonfinite")
"""Keys that a run may be continued with although they differ: they do not change what is computed."""


def _check(condition: bool, flag: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"--{flag} is {value}: it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images and masks are, and how to read them."""

    root: Path | None = None
    """Folder of the data set."""
    layout: Literal["auto", "voc", "cityscapes", "camvid", "globs"] = "auto"
    """How images and masks are arranged below the root."""
    images: str | None = None
    """With layout globs: pattern of the images below the root, for example `photos/**/*.jpg`."""
    masks: str | None = None
    """With layout globs: pattern of the masks below the root, for example `labels/**/*.png`."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their ids; empty: from `classes.json` in the root, or the layout's own."""
    mask_map: tuple[str, ...] = ()
    """What masks hold where that is not class ids, as STORED=CLASS: ids (7=0, 1-150=0-149, 0=ignore) or colours (#804080=road)."""
    unlabelled: tuple[Path, ...] = ()
    """Further folders, anywhere: every image below one is an unlabelled image, named FOLDER/PATH by the folder's own name."""
    exif: bool = True
    """Turn images upright by their EXIF orientation (masks are expected upright); off: read both as stored."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Where the images are, which of them are labelled, and who loads them."""

    index: Path | None = None
    """Folder of the prepared index; by default `index` in the run's folder."""
    split: Path | None = None
    """Folder with labeled.txt, unlabeled.txt and val.txt; by default one is drawn into the run's folder."""
    fraction: str = "1/8"
    """Share (1/8, 0.125) or number (92) of training images that keep their labels, where no split is given."""
    split_seed: int = 0
    """Seed of the drawn split."""
    val: float | None = None
    """Share of the training images drawn for validation; unset: the data set's own validation list."""
    loader: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes and augments: DALI, or PIL and NumPy worker threads."""
    threads: int = 0
    """Threads that decode and augment, per rank; 0: the machine's cores divided among its ranks."""

    def __post_init__(self):
        _check(self.val is None or 0 < self.val < 1, "data.val", self.val, "between 0 and 1")
        _check(self.threads >= 0, "data.threads", self.threads, "0 or more")
        _check(0 <= self.split_seed < 2**64, "data.split-seed", self.split_seed, "from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: Literal["deeplabv3plus", "pspnet", "deeplabv2"] = "deeplabv3plus"
    """Architecture."""
    backbone: Literal["resnet18", "resnet50", "resnet101"] = "resnet50"
    """Backbone."""
    output_stride: Literal[8, 16, 32] = 8
    """Input pixels per pixel of the backbone's last map."""
    pretrained: str = "none"
    """Path of a torchvision ResNet file or of a checkpoint to start from; `imagenet`: torchvision's ResNet, downloaded once;
    `none`: from scratch."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Size of the crops and of the images they are cut from."""

    crop_px: int = 321
    """Side of the square crop, pixels."""
    long_side: tuple[int, int] = (200, 800)
    """The longer side is resized to an integer drawn from this range, ends included, pixels."""

    def __post_init__(self):
        _check(self.crop_px >= 1, "augment.crop-px", self.crop_px, "at least 1")
        low, high = self.long_side
        _check(1 <= low <= high, "augment.long-side", f"{low} {high}", "two ordered numbers, at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; every stage that trains uses it."""

    epochs: int = 80
    """Epochs of every stage that trains."""
    supervised_epochs: int | None = None
    """Epochs of stage 1 where they differ; from scratch on few labels an epoch is only a few steps."""
    batch_global: int = 16
    """Images of one optimiser step, over all ranks."""
    accumulate: int = 1
    """Backward passes per optimiser step; each takes an equal part of the rank's share of the batch."""
    lr: float = 0.001
    """Learning rate of the backbone at a global batch of 16; scales linearly with the batch."""
    head_lr_multiplier: float | None = None
    """Learning rate of the head over that of the backbone; unset: 10, or 1 for deeplabv2."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    optimizer: Literal["sgd", "apex"] = "sgd"
    """Fused SGD of PyTorch, or FusedSGD of NVIDIA apex."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; auto: bf16 where the device has it, else fp16 on CUDA and fp32 on a CPU."""
    sync_bn: bool = False
    """Batch-norm statistics over all ranks instead of one rank's images."""
    validate_every: int = 1
    """Epochs between two validations."""
    validate_min_steps: int = 1
    """Steps between two validations, at least: an epoch of few labels is short."""
    select: Literal["best", "last"] = "best"
    """Which epoch becomes the teacher: that of the strictly best validation mIoU, or the last."""
    checkpoint_steps: int = 500
    """Steps between two checkpoints to go on from, at most; one is also written with every validation."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, at most."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose gradient is not finite: end the run, or go on without that step. Either way the weights are
    spared, and nonfinite.jsonl in the stage's folder names the images."""

    def __post_init__(self):
        for name in ("epochs", "batch_global", "accumulate", "validate_every", "validate_min_steps", "checkpoint_steps"):
            _check(getattr(self, name) >= 1, f"train.{name.replace('_', '-')}", getattr(self, name), "at least 1")
        _check(self.supervised_epochs is None or self.supervised_epochs >= 1, "train.supervised-epochs",
               self.supervised_epochs, "at least 1")
        _check(self.checkpoint_minutes > 0, "train.checkpoint-minutes", self.checkpoint_minutes, "above 0")
        _check(0 < self.lr < math.inf, "train.lr", self.lr, "above 0")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        _check(0 <= self.weight_decay < math.inf, "train.weight-decay", self.weight_decay, "0 or more")
        _check(self.head_lr_multiplier is None or 0 <= self.head_lr_multiplier < math.inf, "train.head-lr-multiplier",
               self.head_lr_multiplier, "0 or more")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How pseudo labels are computed."""

    tta: Literal["stpp", "flip", "none"] = "stpp"
    """Views whose probabilities are summed: five scales, each with its mirror image; 1 with mirror; 1."""
    batch_per_rank: int = 8
    """Images of equal size that one rank labels at once, at most."""
    batch_pixels: int = 1 << 22
    """Pixels of the images that one rank labels at once, at most, but for one image that alone has more."""
    max_pixels: int = 1 << 24
    """Images of more pixels are not labelled but listed as bad: the views of a large image need much memory."""
    min_confidence: float = 0.0
    """Pixels whose class has less than this share of the summed probabilities become 255 (ignore)."""
    shard_size: int = 0
    """Images of a shard, the unit of work that an interrupted run keeps or repeats; 0: a 32nd of all, from 16 to 1000."""
    backend: Literal["auto", "tensorrt", "torch-tensorrt", "inductor", "eager"] = "auto"
    """What computes: a compiled teacher, or PyTorch as it is; auto: by the amount of work."""
    _flags = "label."

    def __post_init__(self):
        for name in ("batch_per_rank", "batch_pixels", "max_pixels"):
            _check(getattr(self, name) >= 1, f"{self._flags}{name.replace('_', '-')}", getattr(self, name), "at least 1")
        _check(self.shard_size >= 0, f"{self._flags}shard-size", self.shard_size, "0 or more")
        _check(0 <= self.min_confidence < 1, f"{self._flags}min-confidence", self.min_confidence, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    out: Path | None = None
    """Folder of the run; the same command on it goes on where it stopped."""
    method: Method = "stpp"
    """supervised: labels only; st: one round of pseudo labels; stpp: reliable images first."""
    pseudo_labels: Path | None = None
    """Instead of the method: one stage on the labels and the masks in this folder, of `stpp label` or a run's labelling stage."""
    exclude: Path | None = None
    """With pseudo_labels: a list of images whose masks are not used, lines as in a split."""
    control: bool = False
    """Also train on the labels alone for as many steps as the last stage has."""
    seed: int = 0
    """Key of every random number of the run."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""
    deterministic: bool = False
    """The same bits in every run on the same machine, at some cost in speed."""
    timeout_minutes: float = 30.0
    """A rank that waits so long for another in training ends, and torchrun with it (or starts all again)."""
    profile: bool = False
    """Trace a few steps of every stage that trains: profile/ in its folder has the trace and a table of a step's parts."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    label: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self):
        _check(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2^64 - 1")
        _check(0 < self.timeout_minutes < math.inf, "timeout-minutes", self.timeout_minutes, "above 0")
        _check(self.exclude is None or self.pseudo_labels is not None, "exclude", self.exclude, "given with --pseudo-labels")


def to_dict(config: Any) -> dict:
    """A dataclass as plain JSON values, nested by section."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted key: `{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def differing_keys(ours: dict, theirs: dict, *, may_change: Collection[str] = MAY_CHANGE) -> list[str]:
    """Lines `key: theirs -> ours` for the keys that matter to the result (all but `may_change`) and differ."""
    ours, theirs = flatten(ours), flatten(theirs)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if key not in may_change]
    return [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]


def parse(cls: type[T], args: Sequence[str], *, prog: str, default: T | None = None, recipe: Path | None = None) -> T:
    """Reads `args` into a dataclass; `--help` prints and exits.

    In a recipe's arguments a switch has a value, `--data.exif=False`; on the command line it is `--data.no-exif`.

    Raises:
        UserError: an unknown flag or an impossible value, in one line; the recipe's name stands before it.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(cls, args=list(args), prog=prog, default=default,
                            config=(tyro.conf.FlagConversionOff,) if recipe else ())
    except SystemExit as exit_:
        if not exit_.code and not recipe:
            raise
        where = f"--recipe {recipe}: " if recipe else ""
        raise UserError(where + (_sentence(output.getvalue()) or "holds a key that is no setting (help?)")) from None


def load_recipe(cls: type[T], path: Path) -> T:
    """Reads a recipe (`.toml`) or a run's `config.json`.

    Raises:
        UserError: no such file, not TOML or JSON, an unknown key, an impossible value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; give the path of a .toml file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--recipe {path}: not readable as {'JSON' if str(path).endswith('.json') else 'TOML'} "
                        f"({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"--recipe {path}: expected a table of settings, found {type(values).__name__}")
    return parse(cls, _as_flags(values), prog="stpp", recipe=path)


def _as_flags(values: dict) -> list[str]:
    flags = []
    for key, value in flatten(values).items():
        if isinstance(value, (list, tuple)):
            flags += [f"--{key}", *(str(item) for item in value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def _sentence(box: str) -> str:
    """The words of tyro's framed message, without the frame, its title and the pointers to --help."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts, part = [], []
    for line in [*lines, "─"]:
        if line and not line.strip("─"):
            parts.append(" ".join(part))
            part = []
        else:
            part.append(line)
    kept = []
    for text in (" ".join(part.split()) for part in parts):
        if text.startswith("Perhaps you meant"):
            kept.append("perhaps you meant " + " or ".join(re.findall(r"--[\w.-]+", text)[:3]))
        elif text and not text.startswith(("For full helptext", "Argument helptext")):
            kept.append(re.sub(r"^Error parsing \w+: (?=--)", "", text))
    return "; ".join(kept) or " ".join(box.split())
