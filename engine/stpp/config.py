"""The settings of a run: frozen dataclasses, filled from a recipe (TOML or JSON), then from the command line.

Flags are the field names: `train.epochs` in a recipe is `--train.epochs` on the command line.
"""

import contextlib
import dataclasses
import io
import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from stpp import settings
from stpp.errors import UserError
from stpp.settings import flatten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Method = Literal["supervised", "st", "stpp", "retrain"]
Views = Annotated[Literal["none", "flip", "stpp"], tyro.conf.arg(
    help="Views whose probabilities are summed: the image alone; with its mirror image; "
         "five scales, each with its mirror image.")]
MAY_CHANGE = ("out", "control", "device", "timeout_minutes", "data.threads", "data.index", "profile",
              "train.checkpoint_steps", "train.checkpoint_minutes", "train.on_nonfinite")
"""Keys that a run may be continued with although they differ: they do not change what is computed."""


def _check(condition: bool, flag: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"--{flag} is {value}: it must be {allowed}")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """The device."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto: on CUDA where there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The floating type."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Floating type of the network; auto: bf16 where the device has it, else fp16 on CUDA, fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Who reads images."""

    loader: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes and augments: DALI, or PIL and NumPy worker threads; auto: DALI where it is installed."""
    threads: int = 0
    """Threads that read images and write masks, per rank; 0: the machine's cores divided among its ranks."""
    _section = ""

    def __post_init__(self):
        _check(self.threads >= 0, f"{self._section}threads", self.threads, "0 or more")


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
class DataConfig(LoaderConfig, SourceConfig):
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
    _section = "data."

    def __post_init__(self):
        super().__post_init__()
        _check(self.val is None or 0 < self.val < 1, "data.val", self.val, "between 0 and 1")
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
class TrainConfig(PrecisionConfig):
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

    tta: Views = "stpp"
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
    _section = "label."

    def __post_init__(self):
        for name in ("batch_per_rank", "batch_pixels", "max_pixels"):
            _check(getattr(self, name) >= 1, f"{self._section}{name.replace('_', '-')}", getattr(self, name), "at least 1")
        _check(self.shard_size >= 0, f"{self._section}shard-size", self.shard_size, "0 or more")
        _check(0 <= self.min_confidence < 1, f"{self._section}min-confidence", self.min_confidence, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    """A whole run."""

    out: Path | None = None
    """Folder of the run; the same command on it goes on where it stopped."""
    method: Method = "stpp"
    """supervised: labels only; st: one round of pseudo labels; stpp: reliable images first; retrain: one stage on the labels and
    the masks of --pseudo-labels."""
    pseudo_labels: Path | None = None
    """With method retrain: folder of the masks, of `stpp label` or a run's labelling stage."""
    exclude: Path | None = None
    """With method retrain: a list of images whose masks are not used, lines as in a split."""
    control: bool = False
    """Also train on the labels alone for as many steps as the last stage has."""
    seed: int = 0
    """Key of every random number of the run."""
    deterministic: bool = False
    """The same bits in every run on the same machine, at some cost in speed: cuDNN searches no algorithms, for one."""
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
        retrain = self.method == "retrain"
        _check(retrain or self.pseudo_labels is None, "pseudo-labels", self.pseudo_labels, "given with --method retrain")
        _check(retrain or self.exclude is None, "exclude", self.exclude, "given with --method retrain")
        _check(not retrain or self.pseudo_labels is not None, "method", self.method, "given with --pseudo-labels FOLDER")


def to_dict(config: Any) -> dict:
    """A dataclass as plain JSON values, nested by section."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differing_keys(ours: dict, theirs: dict, *, may_change: Collection[str] = MAY_CHANGE) -> list[str]:
    """Lines `key: theirs -> ours` for the keys that matter to the result (all but `may_change`) and differ."""
    ours, theirs = flatten(ours), flatten(theirs)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if key not in may_change]
    return [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]


def parse(cls: type[T], args: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Reads the flags of a command line into a dataclass; `--help` prints and exits.

    Raises:
        UserError: an unknown or missing flag, or an impossible value, in one line.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return tyro.cli(cls, args=list(args), prog=prog, default=default)
        except SystemExit as exit_:
            if not exit_.code:
                raise
            error: BaseException | None = exit_
    while error is not None and not isinstance(error, UserError):  # of `__post_init__`, which tyro caught
        error = error.__context__
    raise UserError(str(error) if error else settings.mistake(cls, args)) from None


def load_recipe(cls: type[T], path: Path) -> T:
    """Reads a recipe (`.toml`) or a run's `config.json`.

    Raises:
        UserError: no such file, not TOML or JSON, an unknown key, an impossible value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
        values = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; give the path of a .toml file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--recipe {path}: not readable as {'JSON' if str(path).endswith('.json') else 'TOML'} "
                        f"({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise UserError(f"--recipe {path}: expected a table of settings, found {type(values).__name__}")
    try:
        return settings.filled(cls, values)
    except UserError as error:
        raise UserError(f"--recipe {path}: {error}") from None
