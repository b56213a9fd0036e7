"""Settings of a run: frozen dataclasses, filled from a recipe (TOML or JSON), then from the command line.

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
    help="Test-time augmentation, probabilities summed over views. none: the image; flip: image and mirror "
         "image; stpp: five scales, each with its mirror image.")]
WindowEdges = Annotated[Literal["cut", "shifted"], tyro.conf.arg(
    help="Windows at the image edge. cut: clipped to the image, as in UniMatch; shifted: moved back inside "
         "at full size, as in UniMatch-V2.")]
BackendName = Literal["auto", "tensorrt", "torch-tensorrt", "inductor", "eager"]
MAY_CHANGE = ("out", "control", "device", "timeout_minutes", "data.root", "data.unlabelled", "data.threads",
              "data.index", "profile", "strict", "train.checkpoint_steps", "train.checkpoint_minutes",
              "train.on_nonfinite")
"""Keys that may differ when a run is resumed: they do not change the result. A moved data set is compared
by its contents."""


def _check(condition: bool, flag: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"--{flag} is {settings.shortened(str(value))}: it must be {allowed}")


def check_view(view_px: int | None, flag: str = "view-px") -> None:
    """Checks the longer side of a whole-image view.

    Raises:
        UserError: it is not in 16..32768 pixels.
    """
    _check(view_px is None or 16 <= view_px <= 1 << 15, flag, view_px, "from 16 to 32768")


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Device to compute on."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to compute on; auto: CUDA if a GPU is available, else the CPU."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Floating-point type."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; auto: bf16 if the device supports it, else fp16 on CUDA, fp32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Image loader."""

    loader: Literal["auto", "dali", "reference"] = "auto"
    """Loader: NVIDIA DALI, or threads with PIL and NumPy (reference); auto: DALI if installed."""
    threads: int = 0
    """Threads per rank that read images and write masks; 0: the machine's cores divided by its ranks."""
    _section = ""

    def __post_init__(self):
        _check(self.threads >= 0, f"{self._section}threads", self.threads, "0 or more")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Location and format of the images and masks."""

    root: Path | None = None
    """Root folder of the data set."""
    layout: Literal["auto", "voc", "cvat", "cityscapes", "camvid", "globs", "coco", "yolo",
                    "labelme"] = "auto"
    """Layout of the data set; with coco, yolo and labelme, masks are drawn from annotated shapes."""
    images: str | None = None
    """Pattern of the images below the root (layouts globs, cvat, coco, yolo, labelme): `photos/**/*.jpg`."""
    masks: str | None = None
    """Pattern of the masks (layout globs): `labels/**/*.png`; or of the files of shapes (layouts coco,
    yolo, labelme)."""
    classes: tuple[str, ...] = ()
    """Class names in the order of their ids; empty: from `classes.json` in the root, or from the layout."""
    mask_map: tuple[str, ...] = ()
    """Mapping from mask values to classes, as STORED=CLASS, if masks do not hold class ids: ids (7=0,
    1-150=0-149, 0=ignore), colours (#804080=road) or shape labels (van=car)."""
    unlabelled: tuple[Path, ...] = ()
    """Additional folders of unlabelled images, anywhere; images are named FOLDER/PATH."""
    exif: bool = True
    """EXIF orientation: images are turned upright (masks must be upright); off: both as stored."""
    follow_links: bool = False
    """Symbolic links out of the root, for example to another disk, are followed; off: they are rejected."""
    unlisted: Literal["background", "ignore"] | None = None
    """Label of pixels outside every shape; required with coco, yolo and labelme."""
    annotated: Literal["upright", "stored"] | None = None
    """Orientation in which EXIF-rotated images were annotated (coco, yolo, labelme); unset: as `exif`."""
    crowds: Literal["class", "ignore"] | None = None
    """Treatment of COCO crowd regions (iscrowd): labelled with their class, or ignored; unset: class."""
    doubtful: Literal["refuse", "ignore"] | None = None
    """Treatment of self-crossing, out-of-image or empty shapes (coco, yolo, labelme); unset: refuse."""

    def prepare_options(self) -> dict[str, Any]:
        """Keyword arguments of `stpp.dataset.index.prepare`: all fields except the root."""
        names = [field.name for field in dataclasses.fields(SourceConfig) if field.name != "root"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderConfig, SourceConfig):
    """Data set, split and loader."""

    index: Path | None = None
    """Folder of the prepared index; unset: `index` in the run folder."""
    split: Path | None = None
    """Folder with labeled.txt, unlabeled.txt and val.txt; unset: a random split in the run folder."""
    fraction: str = "1/8"
    """Share (1/8, 0.125) or number (92) of training images that keep their labels, without `split`."""
    split_seed: int = 0
    """Random seed of the drawn split."""
    val: float | None = None
    """Share of the training images drawn for validation; unset: the data set's own validation list."""
    view_px: int | None = None
    """Longer side, in pixels, to which whole images are resized for validation, labelling and prediction;
    unset: original size. Masks and scores are at the original size."""
    _section = "data."

    def __post_init__(self):
        super().__post_init__()
        _check(self.val is None or 0 < self.val < 1, "data.val", self.val, "between 0 and 1")
        _check(self.val is None or self.split is None, "data.val", self.val, "left out with --data.split, "
               "whose val.txt is the validation list")
        check_view(self.view_px, "data.view-px")
        _check(0 <= self.split_seed < 2**64, "data.split-seed", self.split_seed, "from 0 to 2^64 - 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Network and initial weights."""

    name: Literal["deeplabv3plus", "pspnet", "deeplabv2", "dpt"] = "deeplabv3plus"
    """Architecture of the network."""
    backbone: Literal["resnet18", "resnet50", "resnet101", "resnet50-deep-stem", "resnet101-deep-stem",
                      "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2", "dinov2-small",
                      "dinov2-base", "dinov2-large", "dinov2-giant"] = "resnet50"
    """Backbone; deep stems (UniMatch) and EfficientNet need deeplabv3plus, DINOv2 needs dpt."""
    output_stride: Literal[8, 16, 32] | None = None
    """Output stride of the backbone; unset: 8 for a ResNet, 16 for a deep stem or EfficientNet."""
    pretrained: str = "none"
    """Initial weights: path of a backbone file or checkpoint; `imagenet`: torchvision's ResNet, downloaded
    once, or EfficientNet from an installed package; `dinov2`: the published encoder, downloaded once; `none`:
    random."""
    dropout: Literal["auto", "on", "off"] = "auto"
    """Dropout in the head of deeplabv3plus and pspnet; `auto`: off with a deep stem, else on."""
    freeze_backbone: bool = False
    """Train the head only; the backbone's weights and batch-norm statistics are fixed."""
    freeze_bn: bool = False
    """Fixed batch-norm statistics in the backbone."""
    checkpoint_activations: bool = False
    """Activation checkpointing in transformer blocks: less memory, more time."""

    def __post_init__(self):
        for name in ("freeze_backbone", "freeze_bn"):
            _check(not getattr(self, name) or self.pretrained != "none", f"model.{name.replace('_', '-')}",
                   getattr(self, name), "given with --model.pretrained: a backbone from scratch must be "
                                        "trained")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Crops, and the strength of strong augmentation (pseudo-labelled images, strong views). Defaults as
    published for ST++."""

    crop_px: int = 321
    """Side of the square crop, in pixels."""
    long_side: tuple[int, int] = (200, 800)
    """Range from which the longer side of the resized image is drawn (integer, ends included)."""
    long_side_unit: Literal["px", "percent"] = "px"
    """Unit of `long_side`: pixels, or percent of the image's longer side."""
    jitter_p: float = 0.8
    """Probability of colour jitter."""
    jitter: tuple[float, float] = (0.5, 1.5)
    """Range of the brightness, contrast and saturation factors."""
    hue: float = 0.25
    """Maximum hue shift, in turns of the colour circle; lower it if colour identifies a class."""
    gray_p: float = 0.2
    """Probability of conversion to grayscale."""
    blur_p: float = 0.5
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation, in pixels."""
    box_p: float = 0.5
    """Probability of a box: erased in ST, ST++ (Cutout), pasted from another image in UniMatch (CutMix)."""
    box_area: tuple[float, float] = (0.02, 0.4)
    """Range of the box area, as a share of the crop."""
    box_aspect: tuple[float, float] = (0.3, 1 / 0.3)
    """Range of the box's aspect ratio, height over width."""

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
        # Boxes are redrawn until one fits the crop, so a box of the largest area must fit in some shape.
        flattest, steepest = self.box_aspect
        aspect = min(max(1.0, flattest), steepest)
        _check(self.box_area[1] * max(aspect, 1 / aspect) <= 0.9, "augment.box-aspect",
               f"{flattest} {steepest}",
               "a range in which a box of the largest --augment.box-area fits the crop")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(PrecisionConfig):
    """Training; shared by all training stages."""

    epochs: int = 80
    """Epochs per training stage."""
    supervised_epochs: int | None = None
    """Epochs of stage 1, if different: with few labels an epoch is only a few steps."""
    steps: int | None = None
    """Optimiser steps per training stage; replaces `epochs`."""
    supervised_steps: int | None = None
    """Optimiser steps of stage 1, if different."""
    labelled_ratio: float = 1.0
    """Minimum ratio of labelled to pseudo-labelled entries in retraining, reached by repetition."""
    from_teacher: bool = False
    """Students and the control start from the teacher's weights; unimatch, unimatch-v2 and fixmatch start
    from a stage on the labels alone. Not part of the published methods."""
    recalibrate_bn: int = 0
    """Training images that recompute batch-norm statistics before validation; 0: running averages."""
    batch_global: int = 16
    """Batch size of one optimiser step, summed over ranks."""
    accumulate: int = 1
    """Gradient accumulation: number of backward passes per optimiser step."""
    lr: float = 0.001
    """Learning rate of the backbone for a global batch of 16; scales linearly with the batch."""
    head_lr_multiplier: float | None = None
    """Ratio of the head's learning rate to the backbone's; unset: 10, 1 for deeplabv2, 40 for dpt."""
    warmup_steps: int = 0
    """Warm-up steps, over which the learning rate rises from zero within the poly schedule."""
    momentum: float = 0.9
    """Momentum of SGD; AdamW has betas 0.9 and 0.999."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters; decoupled with AdamW (UniMatch-V2: 0.01)."""
    loss: Literal["ce", "ohem", "ohem-image"] = "ce"
    """Loss of labelled pixels. ce: cross-entropy; ohem: cross-entropy of the hardest pixels (probability
    below 0.7, at least 200,000); ohem-image: the hardest pixels of each image (at least an eighth), which
    does not depend on the number of ranks."""
    optimizer: Literal["sgd", "adamw", "apex"] = "sgd"
    """Optimiser: PyTorch's fused SGD or AdamW, or NVIDIA apex's FusedSGD."""
    compile: bool = False
    """Compile the blocks of the network with torch.compile for training; not yet measured on a GPU."""
    sync_bn: bool = False
    """Synchronised batch norm: statistics over all ranks."""
    validate_every: int = 1
    """Epochs between validations."""
    validate_min_steps: int = 1
    """Minimum steps between validations; useful if epochs are short."""
    validate_window: int | None = None
    """Side, in pixels, of sliding windows for validation, as is usual for Cityscapes; unset: whole images."""
    validate_window_edges: WindowEdges = "cut"
    select: Literal["best", "last"] = "best"
    """Epoch that becomes the teacher: the one with the best validation mIoU, or the last."""
    checkpoint_steps: int = 500
    """Maximum steps between resume checkpoints; every validation also writes one."""
    checkpoint_minutes: float = 10.0
    """Maximum minutes between resume checkpoints."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Reaction to a non-finite gradient: stop the run, or skip the step. The weights stay intact either way,
    and nonfinite.jsonl in the stage folder names the images."""

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
            supervised: the stage is stage 1, on labels alone.
        """
        if supervised and (self.supervised_steps or self.supervised_epochs):
            return self.supervised_steps or self.supervised_epochs * per_epoch
        return self.steps or self.epochs * per_epoch


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Consistency training: UniMatch, UniMatch-V2 and FixMatch."""

    confidence: float = 0.95
    """Confidence threshold of the weak view's pseudo labels; UniMatch on Cityscapes: 0."""
    class_confidence: tuple[str, ...] = ()
    """Confidence thresholds by class, as CLASS=CONFIDENCE (pole=0.6); see `stpp calibrate`."""
    ema: float = 0.996
    """Decay of the moving average that labels and is saved (UniMatch-V2, FixMatch); 0: no average."""

    def __post_init__(self):
        _check(0 <= self.confidence < 1, "consistency.confidence", self.confidence, "from 0 to below 1")
        by_class.check(self.class_confidence, "consistency.class-confidence")
        _check(0 <= self.ema < 1, "consistency.ema", self.ema, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Pseudo labelling."""

    tta: Views = "stpp"
    batch_per_rank: int = 8
    """Maximum images in one labelling batch per rank, all of one size."""
    batch_pixels: int = 1 << 22
    """Maximum pixels in one labelling batch per rank; a larger image is labelled alone."""
    max_pixels: int = 1 << 24
    """Maximum pixels of an image; larger images are listed as bad, not labelled."""
    min_confidence: float | Literal["auto"] = 0.0
    """Confidence threshold; pixels below it become 255. auto: calibrated per class on held-out labels."""
    class_confidence: tuple[str, ...] = ()
    """Confidence thresholds by class, as CLASS=CONFIDENCE (pole=0.6)."""
    keep_share: float = 1.0
    """Share of each class's pixels that keep their label, most confident first; the others become 255."""
    select_by: Literal["reliability", "class"] = "reliability"
    """Selection of the reliable half: of all images, or of each class (the rarest that an image shows)."""
    shard_size: int = 0
    """Images per shard, the unit of resuming; 0: a 32nd of all images, from 16 to 1000."""
    backend: BackendName = "auto"
    """Backend that runs the network: a compiler, or eager PyTorch; auto: chosen by the amount of work."""
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
    """Pseudo labelling in the stages of a run."""

    relabel: bool = False
    """ST++: stage 5 labels all images with the better network, not only those that stage 3 left out. Not part
    of the published method."""
    precision: float | None = None
    """Target precision of each class's pseudo labels, for `--label.min-confidence auto`."""

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
    """Class weights in the loss, from a class's n labelled pixels: 1 / sqrt(n), or 1 / effective number."""
    effective_pixels: float = 1e6
    """Scale N of the effective number of n pixels, N (1 - (1 - 1/N)^n): beyond N, more pixels add little."""
    most_weight: float = 20.0
    """Maximum ratio of the largest to the smallest class weight."""
    logit_adjustment: float = 0.0
    """Logit adjustment: factor of the log of a class's labelled share, in training; 1: as published."""
    sampling: float = 0.0
    """Share of an epoch's images drawn by class, rare classes more often."""
    crop_tries: int = 10
    """Maximum crops drawn for such an image until one shows the class; 1: the first is taken."""

    def __post_init__(self):
        for name, least in (("effective_pixels", 1), ("most_weight", 1), ("crop_tries", 1),
                            ("logit_adjustment", 0)):
            _check(least <= getattr(self, name) < math.inf, f"rare.{name.replace('_', '-')}",
                   getattr(self, name), f"at least {least}")
        _check(0 <= self.sampling <= 1, "rare.sampling", self.sampling, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class AdviseConfig:
    """Held-out labels for the calibration of confidence."""

    share: float = 0.0
    """Share of labelled images held out for calibration, not trained on; 0: the validation list serves."""

    def __post_init__(self):
        _check(0 <= self.share < 1, "advise.share", self.share, "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    """Configuration of a run."""

    out: Path | None = None
    """Run folder. To resume, run the same command again; finished stages are skipped."""
    method: MethodName = "stpp"
    """Training method. supervised: labels only; st: one round of pseudo labels; stpp: two rounds, reliable
    images first; unimatch, unimatch-v2, fixmatch: one stage, weak views label strong views; retrain: one
    stage on the labels and the masks of --pseudo-labels."""
    pseudo_labels: Path | None = None
    """Folder of masks from `stpp label` or a run's labelling stage, for method retrain."""
    exclude: Path | None = None
    """List of images whose masks are not used, in the format of a split, for method retrain."""
    control: bool = False
    """Control: also train on labels alone for as many steps as the last stage has; with --train.from-teacher,
    from the weights of stage 1, for as many as all later stages have."""
    seed: int = 0
    """Random seed of the run."""
    deterministic: bool = False
    """Bitwise reproducible results on the same machine; slower, for example without cuDNN autotuning."""
    timeout_minutes: float = 30.0
    """Maximum minutes a rank waits for another in training before it exits."""
    strict: bool = False
    """Warnings about the data set or its lists are errors."""
    profile: bool = False
    """Profiler trace of a few steps of each training stage, in profile/ of the stage folder."""
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
    """Converts a config to plain JSON values, nested by section."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differing_keys(current: dict, recorded: dict, *,
                   may_change: Collection[str] = MAY_CHANGE) -> list[str]:
    """Lists the keys with different values, except `may_change`, as lines `key: recorded -> current`."""
    current, recorded = flatten(current), flatten(recorded)
    keys = [key for key in sorted(current.keys() | recorded.keys()) if key not in may_change]
    return [f"{key}: {recorded.get(key)} -> {current.get(key)}" for key in keys
            if current.get(key) != recorded.get(key)]


def parse(cls: type[T], args: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Parses command-line flags into a dataclass; `--help` prints and exits.

    Raises:
        UserError: unknown or missing flag, or invalid value; one line.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            return settings.expanded(tyro.cli(cls, args=list(args), prog=prog, default=default))
        except SystemExit as exit_:
            if not exit_.code:
                raise
            error: BaseException | None = exit_
    while error is not None and not isinstance(error, UserError):  # raised in `__post_init__`, under tyro
        error = error.__context__
    raise UserError(str(error) if error else settings.argument_error(cls, args)) from None


def load_recipe(cls: type[T], path: Path) -> T:
    """Loads a recipe (`.toml`) or a run's `config.json`.

    Raises:
        UserError: missing file, invalid TOML or JSON, unknown key, or invalid value.
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
