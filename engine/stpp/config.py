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

from stpp import by_class, files, settings
from stpp.errors import UserError
from stpp.settings import flatten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
MethodName = Literal["supervised", "st", "stpp", "retrain", "unimatch", "unimatch-v2", "fixmatch"]
Views = Annotated[Literal["none", "flip", "stpp"], tyro.conf.arg(
    help="Views whose probabilities are summed: the image alone; with its mirror image; "
         "five scales, each with its mirror image.")]
WindowEdges = Annotated[Literal["cut", "shifted"], tyro.conf.arg(
    help="Windows at the end of a row or column: cut off where the image ends, as UniMatch scores; or "
         "shifted back into the image, all of one size, as UniMatch-V2 does.")]
BackendName = Literal["auto", "tensorrt", "torch-tensorrt", "inductor", "eager"]
MAY_CHANGE = ("out", "control", "device", "timeout_minutes", "data.threads", "data.index", "profile",
              "strict", "train.checkpoint_steps", "train.checkpoint_minutes", "train.on_nonfinite")
"""Keys that a run may be continued with although they differ: they do not change what is computed."""


def _check(condition: bool, flag: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"--{flag} is {value}: it must be {allowed}")


def check_view(view_px: int | None, flag: str = "view-px") -> None:
    """Refuses a size at which no image can be seen.

    Raises:
        UserError: it is.
    """
    _check(view_px is None or 16 <= view_px <= 1 << 15, flag, view_px, "from 16 to 32768")


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
    layout: Literal["auto", "voc", "cvat", "cityscapes", "camvid", "globs", "coco", "yolo",
                    "labelme"] = "auto"
    """How images and masks are arranged below the root; of coco, yolo and labelme masks are drawn from
    shapes."""
    images: str | None = None
    """With layout globs, or one of a tool: pattern of the images below the root, for example
    `photos/**/*.jpg`."""
    masks: str | None = None
    """With layout globs: pattern of the masks below the root, for example `labels/**/*.png`; with coco: the
    JSON file, or a pattern of several."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their ids; empty: from `classes.json` in the root, or the layout's own."""
    mask_map: tuple[str, ...] = ()
    """What masks hold where that is not class ids, as STORED=CLASS: ids (7=0, 1-150=0-149, 0=ignore),
    colours (#804080=road) or labels of shapes (van=car)."""
    unlabelled: tuple[Path, ...] = ()
    """Further folders, anywhere: every image below one is an unlabelled image, named FOLDER/PATH by the
    folder's own name."""
    exif: bool = True
    """Turn images upright by their EXIF orientation (masks are expected upright); off: read both as
    stored."""
    follow_links: bool = False
    """Follow links that lead out of the root, to another disk for example; off: they are refused."""
    unlisted: Literal["background", "ignore"] | None = None
    """With coco, yolo and labelme, which ask for it: what pixels in no shape are."""
    annotated: Literal["upright", "stored"] | None = None
    """With coco, yolo and labelme: images that EXIF turns were annotated upright, as most tools show them, or
    as they are stored; unset: as `exif` says."""
    crowds: Literal["class", "ignore"] | None = None
    """With coco: regions of many objects (iscrowd) are their class, or ignored; unset: their class."""
    doubtful: Literal["refuse", "ignore"] | None = None
    """With coco, yolo and labelme: shapes that cross themselves, leave the image or have no area are refused,
    or their pixels ignored; unset: refused."""

    def prepare_options(self) -> dict[str, Any]:
        """What `stpp.dataset.index.prepare` is given besides the root."""
        names = [one.name for one in dataclasses.fields(SourceConfig) if one.name != "root"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderConfig, SourceConfig):
    """Where the images are, which of them are labelled, and who loads them."""

    index: Path | None = None
    """Folder of the prepared index; by default `index` in the run's folder."""
    split: Path | None = None
    """Folder with labeled.txt, unlabeled.txt and val.txt; by default one is drawn into the run's folder."""
    fraction: str = "1/8"
    """Share (1/8, 0.125) or number (92) of training images that keep their labels, where no split is
    given."""
    split_seed: int = 0
    """Seed of the drawn split."""
    val: float | None = None
    """Share of the training images drawn for validation; unset: the data set's own validation list."""
    view_px: int | None = None
    """Longer side at which the network sees whole images, in validation, labelling and prediction; unset:
    their own size. Masks and scores have the images' own size."""
    _section = "data."

    def __post_init__(self):
        super().__post_init__()
        _check(self.val is None or 0 < self.val < 1, "data.val", self.val, "between 0 and 1")
        check_view(self.view_px, "data.view-px")
        _check(0 <= self.split_seed < 2**64, "data.split-seed", self.split_seed, "from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    name: Literal["deeplabv3plus", "pspnet", "deeplabv2", "dpt"] = "deeplabv3plus"
    """Architecture."""
    backbone: Literal["resnet18", "resnet50", "resnet101", "resnet50-deep-stem", "resnet101-deep-stem",
                      "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "dinov2-small",
                      "dinov2-base", "dinov2-large", "dinov2-giant"] = "resnet50"
    """Backbone; deep stems are UniMatch's and, as EfficientNet, for deeplabv3plus, DINOv2 is for dpt."""
    output_stride: Literal[8, 16, 32] | None = None
    """Input pixels per pixel of the backbone's last map; unset: 8 on a ResNet, 16 on a deep stem or
    EfficientNet."""
    pretrained: str = "none"
    """Path of a backbone's file or of a checkpoint to start from; `imagenet`: torchvision's ResNet,
    downloaded once, or EfficientNet from an installed package; `dinov2`: the published encoder, downloaded
    once; `none`: from scratch."""
    dropout: Literal["auto", "on", "off"] = "auto"
    """Dropout in the head of deeplabv3plus and pspnet; `auto`: on, but off on a deep stem."""
    freeze_backbone: bool = False
    """Train the head alone; the backbone keeps the weights and statistics it starts with."""
    freeze_bn: bool = False
    """The backbone's batch norms keep the statistics they start with."""
    checkpoint_activations: bool = False
    """Compute the inside of a transformer's blocks again in the backward pass instead of keeping it: less
    memory, but more time."""

    def __post_init__(self):
        for name in ("freeze_backbone", "freeze_bn"):
            _check(not getattr(self, name) or self.pretrained != "none", f"model.{name.replace('_', '-')}",
                   getattr(self, name), "given with --model.pretrained: a backbone from scratch is to be "
                                        "trained")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Crops, and the strength of strong augmentation (pseudo-labelled images, strong views). Defaults as
    published for ST++."""

    crop_px: int = 321
    """Side of the square crop, pixels."""
    long_side: tuple[int, int] = (200, 800)
    """The longer side is resized to an integer drawn from this range, ends included."""
    long_side_unit: Literal["px", "percent"] = "px"
    """Unit of long_side: pixels, or percent of the image's own longer side."""
    jitter_p: float = 0.8
    """Probability of colour jitter."""
    jitter: tuple[float, float] = (0.5, 1.5)
    """Range of the factors of brightness, contrast and saturation."""
    hue: float = 0.25
    """Largest shift of the hue, in turns of the colour circle. Lower it where colour is evidence."""
    gray_p: float = 0.2
    """Probability of a gray image."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of its standard deviation, pixels."""
    box_p: float = 0.5
    """Probability of a box: erased by ST and ST++ (cutout), pasted from another image by UniMatch
    (CutMix)."""
    box_area: tuple[float, float] = (0.02, 0.4)
    """Range of its area, as a share of the crop."""
    box_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Range of its height over its width."""

    def __post_init__(self):
        _check(self.crop_px >= 1, "augment.crop-px", self.crop_px, "at least 1")
        low, high = self.long_side
        _check(1 <= low <= high, "augment.long-side", f"{low} {high}", "two ordered numbers, at least 1")
        for name in ("jitter_p", "gray_p", "blur_p", "box_p"):
            _check(0 <= getattr(self, name) <= 1, f"augment.{name.replace('_', '-')}", getattr(self, name),
                   "from 0 to 1")
        _check(0 <= self.hue <= 0.5, "augment.hue", self.hue, "from 0 to 0.5")
        for name, least, most in (("jitter", 0, 10), ("blur_sigma", 0, 100), ("box_area", 0.0001, 0.9),
                                  ("box_aspect", 0.05, 20)):
            low, high = getattr(self, name)
            _check(least <= low <= high <= most, f"augment.{name.replace('_', '-')}", f"{low} {high}",
                   f"two ordered numbers from {least} to {most}")
        # A box of the largest area must fit the crop in some shape, or it would be drawn for ever.
        flattest, steepest = self.box_aspect
        aspect = min(max(1.0, flattest), steepest)
        _check(self.box_area[1] * max(aspect, 1 / aspect) <= 0.9, "augment.box-aspect",
               f"{flattest} {steepest}",
               "a range in which a box of the largest --augment.box-area fits the crop")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PrecisionConfig):
    """One training run; every stage that trains uses it."""

    epochs: int = 80
    """Epochs of every stage that trains."""
    supervised_epochs: int | None = None
    """Epochs of stage 1 where they differ; from scratch on few labels an epoch is only a few steps."""
    steps: int | None = None
    """Optimiser steps of every stage that trains, in place of epochs, whatever the lists' lengths."""
    supervised_steps: int | None = None
    """Optimiser steps of stage 1 where they differ."""
    labelled_ratio: float = 1.0
    """Labelled entries for each pseudo-labelled one when retraining: the labelled list is repeated as often
    as that takes (once at least)."""
    from_teacher: bool = False
    """Students, and the control, start from the weights of the network that labelled, not from the
    pre-trained ones; not part of the published methods."""
    recalibrate_bn: int = 0
    """Weakly augmented training images from which batch-norm statistics are computed before every validation
    and for the weights that are kept; 0: the running averages."""
    batch_global: int = 16
    """Images of one optimiser step, over all ranks."""
    accumulate: int = 1
    """Backward passes per optimiser step; each takes an equal part of the rank's share of the batch."""
    lr: float = 0.001
    """Learning rate of the backbone at a global batch of 16; scales linearly with the batch."""
    head_lr_multiplier: float | None = None
    """Learning rate of the head over that of the backbone; unset: 10, 1 for deeplabv2, 40 for dpt."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero, within the poly schedule."""
    momentum: float = 0.9
    """SGD momentum; AdamW has betas 0.9 and 0.999."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters; AdamW's is decoupled (UniMatch-V2: 0.01)."""
    loss: Literal["ce", "ohem", "ohem-image"] = "ce"
    """Loss of labelled pixels: cross-entropy, or that of the hardest (OHEM: probability below 0.7, 200,000
    pixels at least); ohem-image: of the hardest of each image (an eighth at least), on any ranks alike."""
    optimizer: Literal["sgd", "adamw", "apex"] = "sgd"
    """Fused SGD or AdamW of PyTorch, or FusedSGD of NVIDIA apex."""
    sync_bn: bool = False
    """Batch-norm statistics over all ranks instead of one rank's images."""
    validate_every: int = 1
    """Epochs between two validations."""
    validate_min_steps: int = 1
    """Steps between two validations, at least: an epoch of few labels is short."""
    validate_window: int | None = None
    """Side in pixels of the overlapping windows in which validation sees images, as is usual for Cityscapes;
    unset: it sees them whole."""
    validate_window_edges: WindowEdges = "cut"
    select: Literal["best", "last"] = "best"
    """Which epoch becomes the teacher: that of the strictly best validation mIoU, or the last."""
    checkpoint_steps: int = 500
    """Steps between two checkpoints to go on from, at most; one is also written with every validation."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints, at most."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """After a step whose gradient is not finite: end the run, or go on without that step. Either way the
    weights are spared, and nonfinite.jsonl in the stage's folder names the images."""

    def __post_init__(self):
        for name in ("epochs", "batch_global", "accumulate", "validate_every", "validate_min_steps",
                     "checkpoint_steps"):
            _check(getattr(self, name) >= 1, f"train.{name.replace('_', '-')}", getattr(self, name),
                   "at least 1")
        for name in ("steps", "supervised_steps"):
            _check(getattr(self, name) is None or getattr(self, name) >= 1, f"train.{name.replace('_', '-')}",
                   getattr(self, name), "at least 1")
        _check(self.supervised_epochs is None or self.supervised_steps is None, "train.supervised-steps",
               self.supervised_steps, "given without --train.supervised-epochs")
        _check(0 < self.labelled_ratio <= 1000, "train.labelled-ratio", self.labelled_ratio, "above 0")
        _check(self.recalibrate_bn >= 0, "train.recalibrate-bn", self.recalibrate_bn, "0 or more")
        _check(self.validate_window is None or self.validate_window >= 1, "train.validate-window",
               self.validate_window, "at least 1")
        _check(self.validate_window is not None or self.validate_window_edges == "cut",
               "train.validate-window-edges", self.validate_window_edges,
               "given with --train.validate-window")
        _check(self.warmup_steps >= 0, "train.warmup-steps", self.warmup_steps, "0 or more")
        _check(self.supervised_epochs is None or self.supervised_epochs >= 1, "train.supervised-epochs",
               self.supervised_epochs, "at least 1")
        _check(self.checkpoint_minutes > 0, "train.checkpoint-minutes", self.checkpoint_minutes, "above 0")
        _check(0 < self.lr < math.inf, "train.lr", self.lr, "above 0")
        _check(0 <= self.momentum < 1, "train.momentum", self.momentum, "in [0, 1)")
        _check(0 <= self.weight_decay < math.inf, "train.weight-decay", self.weight_decay, "0 or more")
        _check(self.head_lr_multiplier is None or 0 <= self.head_lr_multiplier < math.inf,
               "train.head-lr-multiplier", self.head_lr_multiplier, "0 or more")

    def stage_steps(self, per_epoch: int, *, supervised: bool = False) -> int:
        """Optimiser steps of a stage.

        Args:
            per_epoch: steps of one epoch of its lists.
            supervised: of stage 1, on the labels alone.
        """
        if supervised and (self.supervised_steps or self.supervised_epochs):
            return self.supervised_steps or self.supervised_epochs * per_epoch
        return self.steps or self.epochs * per_epoch


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """UniMatch, UniMatch-V2 and FixMatch."""

    confidence: float = 0.95
    """Probability from which a pixel's class in the weak view is a label for the strong views; UniMatch on
    Cityscapes: 0."""
    class_confidence: tuple[str, ...] = ()
    """Classes with another confidence, as CLASS=CONFIDENCE (pole=0.6); `stpp calibrate` proposes them."""
    ema: float = 0.996
    """Decay of the moving average that labels, is validated and kept (UniMatch-V2, FixMatch); 0: the network
    itself."""

    def __post_init__(self):
        _check(0 <= self.confidence < 1, "consistency.confidence", self.confidence, "from 0 to below 1")
        by_class.check(self.class_confidence, "consistency.class-confidence")
        _check(0 <= self.ema < 1, "consistency.ema", self.ema, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How pseudo labels are computed."""

    tta: Views = "stpp"
    batch_per_rank: int = 8
    """Images of equal size that one rank labels at once, at most."""
    batch_pixels: int = 1 << 22
    """Pixels of the images that one rank labels at once, at most, but for one image that alone has more."""
    max_pixels: int = 1 << 24
    """Images of more pixels are not labelled but listed as bad: the views of a large image need much
    memory."""
    min_confidence: float | Literal["auto"] = 0.0
    """Pixels whose class has less than this share of the summed probabilities become 255 (ignore); auto: by
    class, from held-out labels, what gives the wanted precision."""
    class_confidence: tuple[str, ...] = ()
    """Classes with another least confidence, as CLASS=CONFIDENCE (pole=0.6)."""
    keep_share: float = 1.0
    """Share of each class's pixels that keep their label, the most confident ones; the rest become 255."""
    select_by: Literal["reliability", "class"] = "reliability"
    """Which half of the images a selection trusts: the reliable half of all, or of the images of each class,
    where an image counts for the rarest class that it shows."""
    shard_size: int = 0
    """Images of a shard, the unit of work that an interrupted run keeps or repeats; 0: a 32nd of all, from 16
    to 1000."""
    backend: BackendName = "auto"
    """What computes: a compiled teacher, or PyTorch as it is; auto: by the amount of work."""
    _section = "label."

    def __post_init__(self):
        for name in ("batch_per_rank", "batch_pixels", "max_pixels"):
            _check(getattr(self, name) >= 1, f"{self._section}{name.replace('_', '-')}", getattr(self, name),
                   "at least 1")
        _check(self.shard_size >= 0, f"{self._section}shard-size", self.shard_size, "0 or more")
        _check(self.min_confidence == "auto" or 0 <= self.min_confidence < 1,
               f"{self._section}min-confidence", self.min_confidence, "auto, or from 0 to below 1")
        by_class.check(self.class_confidence, f"{self._section}class-confidence")
        _check(0 < self.keep_share <= 1, f"{self._section}keep-share", self.keep_share, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class StageLabelConfig(LabelConfig):
    """How the stages of a run compute pseudo labels."""

    precision: float | None = None
    """With min-confidence auto: share of the pixels of each class whose label is to be right."""

    def __post_init__(self):
        super().__post_init__()
        _check(self.precision is None or 0 < self.precision < 1, "label.precision", self.precision,
               "between 0 and 1")
        _check((self.precision is not None) == (self.min_confidence == "auto"), "label.precision",
               self.precision, "given with --label.min-confidence auto, and only then")


@dataclass(frozen=True, kw_only=True)
class RareConfig:
    """Remedies for rare classes; all are off by default."""

    weights: Literal["none", "inverse-sqrt", "effective"] = "none"
    """Factors of the classes in the loss, from their labelled pixels n: 1 / sqrt(n), or one over the
    effective number of n."""
    effective_pixels: float = 1e6
    """Pixels N from which on more of a class add little: the effective number of n is N (1 - (1 - 1/N)^n)."""
    most_weight: float = 20.0
    """Largest factor of a class over the smallest of all."""
    logit_adjustment: float = 0.0
    """Factor of the logarithm of a class's labelled share, added to its logits in training alone; 1: as
    published."""
    sampling: float = 0.0
    """Share of a list's places that are filled by class: a class is drawn (the rarer the likelier), then an
    image that shows it."""
    crop_tries: int = 10
    """Crops drawn for such a place, at most, until one shows the class; 1: the first is taken."""

    def __post_init__(self):
        for name, least in (("effective_pixels", 1), ("most_weight", 1), ("crop_tries", 1),
                            ("logit_adjustment", 0)):
            _check(least <= getattr(self, name) < math.inf, f"rare.{name.replace('_', '-')}",
                   getattr(self, name), f"at least {least}")
        _check(0 <= self.sampling <= 1, "rare.sampling", self.sampling, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Labels that a run keeps to judge the confidence of its pseudo labels by."""

    share: float = 0.0
    """Share of the labelled images that is not trained on, for `stpp calibrate` and --label.min-confidence
    auto; 0: they take the validation list."""

    def __post_init__(self):
        _check(0 <= self.share < 1, "advise.share", self.share, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    """A whole run."""

    out: Path | None = None
    """Folder of the run; the same command on it goes on where it stopped."""
    method: MethodName = "stpp"
    """supervised: labels only; st: one round of pseudo labels; stpp: reliable images first; unimatch,
    unimatch-v2, fixmatch: one stage in which weak views label strong ones; retrain: one stage on the labels
    and the masks of --pseudo-labels."""
    pseudo_labels: Path | None = None
    """With method retrain: folder of the masks, of `stpp label` or a run's labelling stage."""
    exclude: Path | None = None
    """With method retrain: a list of images whose masks are not used, lines as in a split."""
    control: bool = False
    """Also train on the labels alone for as many steps as the last stage has."""
    seed: int = 0
    """Key of every random number of the run."""
    deterministic: bool = False
    """The same bits in every run on the same machine, at some cost in speed: cuDNN searches no algorithms,
    for one."""
    timeout_minutes: float = 30.0
    """A rank that waits so long for another in training ends, and torchrun with it (or starts all again)."""
    strict: bool = False
    """Refuse a data set, or lists, that give cause for a warning."""
    profile: bool = False
    """Trace a few steps of every stage that trains: profile/ in its folder has the trace and a table of a
    step's parts."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    label: StageLabelConfig = field(default_factory=StageLabelConfig)
    rare: RareConfig = field(default_factory=RareConfig)
    advise: AdviseConfig = field(default_factory=AdviseConfig)

    def __post_init__(self):
        _check(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2^64 - 1")
        _check(0 < self.timeout_minutes < math.inf, "timeout-minutes", self.timeout_minutes, "above 0")
        retrain = self.method == "retrain"
        _check(retrain or self.pseudo_labels is None, "pseudo-labels", self.pseudo_labels,
               "given with --method retrain")
        _check(retrain or self.exclude is None, "exclude", self.exclude, "given with --method retrain")
        _check(not retrain or self.pseudo_labels is not None, "method", self.method,
               "given with --pseudo-labels FOLDER")


def to_dict(config: Any) -> dict:
    """A dataclass as plain JSON values, nested by section."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differing_keys(ours: dict, theirs: dict, *, may_change: Collection[str] = MAY_CHANGE) -> list[str]:
    """Lines `key: theirs -> ours` for the keys that matter to the result (all but `may_change`) and
    differ."""
    ours, theirs = flatten(ours), flatten(theirs)
    keys = [key for key in sorted(ours.keys() | theirs.keys()) if key not in may_change]
    return [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in keys
            if ours.get(key) != theirs.get(key)]


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
    raise UserError(str(error) if error else settings.argument_error(cls, args)) from None


def load_recipe(cls: type[T], path: Path) -> T:
    """Reads a recipe (`.toml`) or a run's `config.json`.

    Raises:
        UserError: no such file, not TOML or JSON, an unknown key, an impossible value.
    """
    try:
        text = files.read_text(path)
        values = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}; give the path of a .toml file") from None
    except (ValueError, RecursionError) as error:
        backslash = "; write paths with forward slashes, or in 'single quotes'" if "\\" in str(error) else ""
        raise UserError(f"--recipe {path}: not readable as "
                        f"{'JSON' if str(path).endswith('.json') else 'TOML'} "
                        f"({str(error).splitlines()[0]}){backslash}") from None
    if not isinstance(values, dict):
        raise UserError(f"--recipe {path}: expected a table of settings, found {type(values).__name__}")
    try:
        return settings.from_values(cls, values)
    except UserError as error:
        raise UserError(f"--recipe {path}: {error}") from None
