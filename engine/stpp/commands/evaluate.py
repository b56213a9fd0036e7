"""`stpp evaluate`: the scores of a checkpoint. Nothing heavy is imported before it runs."""

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
class OnLabels:
    """A checkpoint, and labelled images that it is looked at on."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    index: Path | None = None
    """Folder of a prepared index; by default that of the run that the checkpoint lies in."""
    list: Path | None = None
    """Lines `image mask`; by default val.txt of the run that the checkpoint lies in."""
    output_stride: OutputStride = None
    view_px: ViewPx = None
    compute: Compute = ComputeConfig()
    reading: Reading = LoaderConfig()

    def __post_init__(self):
        config.check_view(self.view_px)


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnLabels):
    """Score a checkpoint: mIoU and IoU of every class at native size."""

    tta: Views = "none"
    sliding_window: int | None = None
    """Side in pixels of the crops that the network sees instead of the whole image (each in the views of
    --tta), as is usual for Cityscapes. One begins at every two thirds of the side; probabilities are averaged
    where they overlap."""
    window_edges: WindowEdges = "cut"
    out: Path | None = None
    """Also write the scores to this JSON file."""

    def __post_init__(self):
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"--sliding-window is {self.sliding_window}: it must be at least 1")
        if self.sliding_window is None and self.window_edges != "cut":
            raise UserError(f"--window-edges {self.window_edges}: give --sliding-window PX with it")


def evaluate(args: Sequence[str]) -> None:
    """Runs `stpp evaluate`.

    Raises:
        UserError: no such checkpoint, index or list, or classes that do not match.
    """
    options = config.parse(Evaluate, args, prog="stpp evaluate")
    folder, listed = of_run(options, run_of(options.checkpoint))
    from stpp import distributed, log
    from stpp.inference import evaluate as scoring

    with distributed.world(options.compute.device) as here:
        log.set_speaker(here.is_main)
        scored = opened(options, folder, listed, here)
        matrix = scoring.evaluate(scored.predictor, scored.samples, here, scored.data, mode=options.tta,
                                  crop_px=options.sliding_window, edges=options.window_edges)
        if here.is_main:
            print(scoring.report(matrix, scored.classes, images=len(scored.samples)))
            # After the table: a disk that is full costs the file alone.
            scoring.report(matrix, scored.classes, images=len(scored.samples), out=options.out)


@dataclass(frozen=True, kw_only=True)
class ReadyCheckpoint:
    """A checkpoint that is ready, and what it is looked at on."""

    predictor: "EagerPredictor"
    classes: Sequence[str]
    weights: str
    """See `stpp.inference.record.weights_sha256`."""
    samples: "Sequence[Sample]"
    data: DataConfig


def opened(options: OnLabels, folder: Path, listed: Path, here: "World") -> ReadyCheckpoint:
    """Opens the checkpoint, and the labelled images of a list in an index.

    Raises:
        UserError: no such index or list, another EXIF rule, or classes that do not match.
    """
    from stpp import log
    from stpp.dataset import splits
    from stpp.inference import exif_rule
    from stpp.inference.open import EagerPredictor
    from stpp.inference.record import weights_sha256
    from stpp.models.pretrained import describe
    from stpp.models.trained import load_network
    from stpp.precision import autocast_dtype
    from stpp.run.freshness import fresh_index

    known = fresh_index(folder, listed, here)
    data = DataConfig(exif=known.exif, loader=options.reading.loader, threads=options.reading.threads)
    samples = splits.read_split(listed, known, labelled=True)
    network, classes, architecture = load_network(options.checkpoint, output_stride=options.output_stride,
                                                  view_px=options.view_px, class_names=known.classes)
    if (rule := exif_rule.recorded(options.checkpoint)) not in (None, known.exif):
        raise UserError(f"{options.checkpoint} was trained on images {exif_rule.describe(rule)}, and "
                        f"{folder} is of images {exif_rule.describe(known.exif)}; prepare an index with "
                        f"--data.{'' if rule else 'no-'}exif")
    if tuple(classes) != tuple(known.classes):
        raise UserError(
            f"{options.checkpoint} was trained on {len(classes)} classes ({', '.join(classes)}) but "
            f"{folder} has {len(known.classes)} ({', '.join(known.classes)}); use the matching index")
    if network.pretrained is not None:
        log.say(f"{options.checkpoint}: started from {describe(network.pretrained)}")
    predictor = EagerPredictor(network, num_classes=len(classes), device=here.device,
                               dtype=autocast_dtype(options.compute.precision, here.device),
                               view_px=architecture.get("view_px"))
    return ReadyCheckpoint(predictor=predictor, classes=classes, weights=weights_sha256(network.state_dict()),
                           samples=samples, data=data)


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it lies in one.

    Raises:
        UserError: there is no such checkpoint.
    """
    if not files.and_part(checkpoint)[0].is_file():
        raise UserError(f"--checkpoint {checkpoint}: no such file")
    above = checkpoint.resolve().parents
    return next((folder for folder in above if (folder / "config.json").exists()), None)


def of_run(options: OnLabels, run: Path | None) -> tuple[Path, Path]:
    """Index folder and list to look at: as given, else those of the run that the checkpoint lies in."""
    if options.index and options.list:
        return options.index, options.list  # a config.json above the file may be anybody's
    from stpp.dataset import splits

    data = config.load_recipe(Config, run / "config.json").data if run else None
    folder = options.index or (data and (data.index or run / "index"))
    listed = options.list or (
        data and (splits.find_val(data.split) if data.split else run / "split" / splits.VAL))
    if folder is None or listed is None:
        raise UserError(f"--checkpoint {options.checkpoint} lies in no run; name a prepared index with "
                        "--index and a file with lines `image mask` with --list")
    return folder, listed
