"""`stpp evaluate`: scores of a checkpoint. Heavy imports are deferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stpp import config, files
from stpp.commands.options import Compute, ComputeConfig, OutputStride, Reading, ViewPx
from stpp.config import Config, DataConfig, LoaderConfig, Views, WindowEdges
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.distributed import World
    from stpp.inference.open import EagerPredictor
    from stpp.loading.sample import Sample


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """Options for a checkpoint and labelled images."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    index: Path | None = None
    """Folder of a prepared index; default: the index of the checkpoint's run."""
    list: Path | None = None
    """File with lines `image mask`; default: val.txt of the checkpoint's run."""
    output_stride: OutputStride = None
    view_px: ViewPx = None
    compute: Compute = ComputeConfig()
    reading: Reading = LoaderConfig()

    def __post_init__(self):
        config.check_view(self.view_px)


@dataclass(frozen=True, kw_only=True)
class Evaluate(ScoringOptions):
    """Score a checkpoint at native size: mIoU and IoU of every class."""

    tta: Views = "none"
    sliding_window: int | None = None
    """Side in pixels of sliding-window crops (each in the views of --tta), as is usual for Cityscapes. The
    stride is two thirds of the side; overlapping probabilities are averaged. Default: the whole image."""
    window_edges: WindowEdges = "cut"
    out: Path | None = None
    """Also write the scores to this JSON file."""

    def __post_init__(self):
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"--sliding-window is {self.sliding_window}: it must be at least 1")
        if self.sliding_window is None and self.window_edges != "cut":
            raise UserError(f"--window-edges {self.window_edges}: needs --sliding-window PX")


def evaluate(args: Sequence[str]) -> None:
    """Runs `stpp evaluate`.

    Raises:
        UserError: missing checkpoint, index or list, or mismatched classes.
    """
    options = config.parse(Evaluate, args, prog="stpp evaluate")
    folder, list_path = index_and_list(options, run_of(options.checkpoint))
    if options.out is not None:
        files.require_writable(options.out, "--out")
    from stpp import distributed, log
    from stpp.inference import evaluate as scoring

    with distributed.world(options.compute.device) as world:
        log.set_speaker(world.is_main)
        checkpoint = open_checkpoint(options, folder, list_path, world)
        matrix = scoring.evaluate(checkpoint.predictor, checkpoint.samples, world, checkpoint.data,
                                  mode=options.tta, crop_px=options.sliding_window,
                                  edges=options.window_edges, refuse_nonfinite=True)
        if world.is_main:
            print(scoring.report(matrix, checkpoint.classes, images=len(checkpoint.samples)))
            # After the table, so that a full disk loses only the file.
            scoring.report(matrix, checkpoint.classes, images=len(checkpoint.samples), out=options.out)


@dataclass(frozen=True, kw_only=True)
class ReadyCheckpoint:
    """An opened checkpoint with the images to run it on."""

    predictor: "EagerPredictor"
    classes: Sequence[str]
    network: str
    """See `stpp.inference.protocol.Identity.network`."""
    samples: "Sequence[Sample]"
    data: DataConfig


def open_checkpoint(options: ScoringOptions, folder: Path, list_path: Path,
                    world: "World") -> ReadyCheckpoint:
    """Opens the checkpoint, and the labelled images of a list in an index.

    Raises:
        UserError: missing index or list, another EXIF rule, or mismatched classes.
    """
    from stpp import log
    from stpp.dataset import splits
    from stpp.inference import exif_rule
    from stpp.inference.open import EagerPredictor
    from stpp.inference.protocol import identity_of
    from stpp.models.pretrained import describe
    from stpp.models.trained import load_network
    from stpp.precision import autocast_dtype
    from stpp.run.freshness import fresh_index

    index = fresh_index(folder, list_path, world)
    data = DataConfig(exif=index.exif, loader=options.reading.loader, threads=options.reading.threads)
    samples = splits.read_split(list_path, index, labelled=True)
    loaded = load_network(options.checkpoint, output_stride=options.output_stride, view_px=options.view_px,
                          class_names=index.classes)
    network, classes, architecture = loaded
    if (rule := exif_rule.recorded(options.checkpoint)) not in (None, index.exif):
        raise UserError(f"{options.checkpoint} was trained on images {exif_rule.describe(rule)}, but "
                        f"{folder} holds images {exif_rule.describe(index.exif)}; prepare an index with "
                        f"--data.{'' if rule else 'no-'}exif")
    if tuple(classes) != tuple(index.classes):
        raise UserError(
            f"{options.checkpoint} was trained on {len(classes)} classes ({', '.join(classes)}) but "
            f"{folder} has {len(index.classes)} ({', '.join(index.classes)}); use the matching index")
    if network.pretrained is not None:
        log.say(f"{options.checkpoint}: started from {describe(network.pretrained)}")
    predictor = EagerPredictor(network, num_classes=len(classes), device=world.device,
                               dtype=autocast_dtype(options.compute.precision, world.device),
                               view_px=architecture.get("view_px"))
    return ReadyCheckpoint(predictor=predictor, classes=classes, network=identity_of(loaded).network,
                           samples=samples, data=data)


def run_of(checkpoint: Path) -> Path | None:
    """Folder of the run that contains a checkpoint; None outside a run.

    Raises:
        UserError: the checkpoint does not exist.
    """
    if not files.and_part(checkpoint)[0].is_file():
        raise UserError(f"--checkpoint {checkpoint}: no such file")
    above = checkpoint.resolve().parents
    return next((folder for folder in above if (folder / "config.json").exists()), None)


def index_and_list(options: ScoringOptions, run: Path | None) -> tuple[Path, Path]:
    """Index folder and list file: from the flags, otherwise from the checkpoint's run."""
    if options.index and options.list:
        return options.index, options.list  # a config.json above the file may be unrelated
    from stpp.dataset import splits

    data = config.load_recipe(Config, run / "config.json").data if run else None
    folder = options.index or (data and (data.index or run / "index"))
    list_path = options.list or (
        data and (splits.find_val(data.split) if data.split else run / "split" / splits.VAL))
    if folder is None or list_path is None:
        raise UserError(f"--checkpoint {options.checkpoint} is not in a run; give a prepared index with "
                        "--index and a file with lines `image mask` with --list")
    return folder, list_path
