"""`stpp label` and `stpp select`: flags and terminal output. Heavy imports are deferred."""

import errno
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from stpp import by_class, config, files
from stpp.commands.exif_flags import exif_asked
from stpp.commands.options import (
    Compute,
    ComputeConfig,
    OutputStride,
    Reading,
    TrustEngine,
    ViewPx,
)
from stpp.config import DataConfig, LabelConfig, LoaderConfig
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.inference.predictors import OpenedPredictor
    from stpp.label.run import Summary

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
REASONS = 5
"""Bad images listed on the terminal."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(LabelConfig):
    """Flags shared by both commands."""

    source: str
    """Local path or fsspec URL of a folder (with sub-folders), a list file, or tar archives
    (shards/{000..127}.tar)."""
    out: Path
    """Output folder. To resume, run the same command again; finished shards are skipped."""
    root: Path | None = None
    """With a list: base folder of its relative paths; default: the list's own folder."""
    tar_folders: bool = False
    """With archives: write the masks of each to its own folder, for archives with equal member names."""
    part: str = "1/1"
    """i/n: process every n-th shard only, on machines without a shared torchrun; all n parts form the
    whole."""
    verify: bool = False
    """Also check finished shards for missing, truncated or altered files, and redo the damaged ones."""
    update: bool = False
    """Label only images that are new or changed since the source was listed; masks of removed images are
    deleted."""
    list_only: bool = False
    """Only list the source and check its names, in one process without a GPU. Then run the same command
    without this flag."""
    max_bad_fraction: float = 0.01
    """Highest share of bad images; above it the exit code is 1. Good images are labelled in any case."""
    exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Rotate images upright by their EXIF orientation. Without this and --no-exif: as in training, if the
    checkpoint records it; otherwise upright."""
    no_exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read images as stored, ignoring EXIF orientation."""
    compute_threads: int = 0
    """CPU compute threads per rank; 0: the threads of the first run on this output, or the cores divided
    among the ranks."""
    view_px: ViewPx = None
    trust_engine: TrustEngine = False
    compute: Compute = ComputeConfig()
    reading: Reading = LoaderConfig()
    _section = ""

    def __post_init__(self):
        super().__post_init__()
        if self.compute_threads < 0:
            raise UserError(f"--compute-threads is {self.compute_threads}: it must be 0 or more")
        config.check_view(self.view_px)
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction is {self.max_bad_fraction}: it must be from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Label(CorpusOptions):
    """Write pseudo labels for any number of images with a trained network."""

    teacher: Path
    """A best.pt or third-*.pt of a run, a published state dict, or the folder of an engine that
    `stpp compile` made."""
    output_stride: OutputStride = None
    output: Literal["png", "tar"] = "png"
    """One PNG file per mask, or one tar archive per shard."""
    target_precision: float | None = None
    """With --min-confidence auto: target share of correct labels in each class."""
    calibration: Path | None = None
    """With --min-confidence auto: the file of `stpp calibrate`; default: calibration.json in the teacher's
    folder."""

    def __post_init__(self):
        super().__post_init__()
        auto = self.min_confidence == "auto"
        if self.target_precision is not None and not 0 < self.target_precision < 1:
            raise UserError(f"--target-precision is {self.target_precision}: it must be between 0 and 1")
        if auto != (self.target_precision is not None) or (self.calibration is not None and not auto):
            raise UserError("--min-confidence auto and --target-precision require each other, and "
                            "--calibration requires both; for example, --min-confidence auto "
                            "--target-precision 0.95")


@dataclass(frozen=True, kw_only=True)
class Select(CorpusOptions):
    """Rank images by the agreement of several checkpoints (one view each) and halve the list; the reliable
    half comes first."""

    checkpoints: tuple[Path, ...]
    """Checkpoints of one run in training order; the last one is the reference. ST++ uses third-1.pt
    third-2.pt third-3.pt."""


def label(args: Sequence[str]) -> None:
    """Runs `stpp label`."""
    options = config.parse(Label, args, prog="stpp label")

    def work(open_teachers, task, world) -> "Summary":
        from stpp.label.labels import label_corpus

        return label_corpus(open_teachers, task, world, floors=floors)

    def floors(teacher: "OpenedPredictor") -> tuple[float, ...]:
        return _floors(options, teacher)

    _run(options, [options.teacher], options.tta, work, "mean confidence", output=options.output,
         output_stride=options.output_stride)


def _floors(options: Label, teacher: "OpenedPredictor") -> tuple[float, ...]:
    """Confidence threshold of each class; empty if one threshold applies to all.

    Raises:
        UserError: an unknown class, or no calibration of this teacher with these views.
    """
    threshold = options.min_confidence
    if threshold == "auto":
        from stpp.inference import calibration
        from stpp.run.calibrated import floors_of

        path = options.calibration or options.teacher.parent / calibration.NAME
        calibrated = calibration.read(path)
        if calibrated.tta != options.tta or not teacher.identity.startswith(f"{calibrated.network}-"):
            same_weights = teacher.identity.partition("-")[0] == calibrated.network.partition("-")[0]
            other = (f"{calibrated.tta} views" if calibrated.tta != options.tta else
                     "another view size or output stride" if same_weights else "other weights")
            raise UserError(f"{path} was measured with {other}; run `stpp calibrate --checkpoint "
                            f"{options.teacher} --tta {options.tta}`")
        threshold = floors_of(calibrated, options.target_precision)
    elif not options.class_confidence:
        return ()
    return by_class.filled(options.class_confidence, "class-confidence", teacher.classes, threshold)


def select(args: Sequence[str]) -> None:
    """Runs `stpp select`."""
    options = config.parse(Select, args, prog="stpp select")
    if len(options.checkpoints) < 2:
        raise UserError(f"--checkpoints: got {len(options.checkpoints)}; two or more are needed")

    def work(open_teachers, task, world) -> "Summary":
        from stpp.label.reliability import select_corpus

        return select_corpus(open_teachers, task, world)

    _run(options, options.checkpoints, "none", work, "mean reliability", title="select", table="scores")


def _run(options: CorpusOptions, paths: Sequence[Path], mode: str, work: Callable[..., "Summary"],
         mean_name: str, *, output_stride: int | None = None, **assignment: str) -> None:
    """Runs a command on this rank and reports the result.

    Args:
        work: labels or scores the corpus on this rank.
        mean_name: name of the summary's mean value.
        assignment: command-specific fields of the `Assignment`.

    Raises:
        UserError: invalid input, or an unwritable output.
        SystemExit: 1 if too many images are bad, or the disk is full.
    """
    from stpp import distributed, log
    from stpp.images.items import require_readable_name
    from stpp.images.sources import open_source
    from stpp.inference import exif_rule, predictors
    from stpp.label.assignment import Assignment
    from stpp.label.shards import Part
    from stpp_kernels import describe_implementations

    for path in paths:
        if not files.and_part(path)[0].exists():
            raise UserError(f"{path}: no such checkpoint or engine")
    classes: list[str] = []
    with distributed.world(options.compute.device) as world:
        log.set_speaker(world.is_main)
        log.say(f"operators: {describe_implementations(world.device.type)}")
        if options.compute_threads:
            import torch

            torch.set_num_threads(options.compute_threads)
        try:
            require_readable_name(str(options.out.absolute()), "--out")
            source = open_source(options.source, root=options.root, tar_folders=options.tar_folders)
            part = Part.parse(options.part)
            refuse_inside(options.out, options.source)
            exif = exif_rule.resolve(paths, exif_asked(options.exif, options.no_exif))
        except UserError:
            if world.is_main:
                raise
            sys.exit(2)  # all ranks fail alike; one reports it
        open_all = predictors.from_paths(paths, world.device, mode=mode, backend=options.backend,
                                      precision=options.compute.precision,
                                       trust=options.trust_engine, output_stride=output_stride,
                                      view_px=options.view_px)

        def opened(images: int) -> list:
            predictors = open_all(images)
            classes.extend(predictors[0].classes)
            return predictors

        task = Assignment(source=source, out=options.out, config=options, part=part, verify=options.verify,
                          data=DataConfig(exif=exif, loader=options.reading.loader,
                                          threads=options.reading.threads),
                          update=options.update, list_only=options.list_only, **assignment)
        try:
            summary = work(opened, task, world)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                reason = files.describe_error(error)
                raise UserError(f"--out {options.out}: {reason}; choose a writable folder") from None
            if error.errno not in _DISK_FULL:
                raise
            print(f"stpp: --out {options.out}: {error.strerror}; make room and run the same command again: "
                  "finished shards are kept", file=sys.stderr, flush=True)
            sys.exit(1)
        if world.is_main:
            _report_end(options, summary, mean_name, classes)


def _report_end(options: CorpusOptions, summary: "Summary", mean_name: str, classes: list[str]) -> None:
    """Prints the result of a run; exits with 1 if too many images are bad."""
    from stpp import log

    if options.list_only:
        print(f"{options.out}: {summary.listed} images listed, {summary.shards_left} shards to do, "
              f"{summary.wall_s:.1f} s",
              flush=True)
        return
    print(report(summary, options.out, mean_name, classes), flush=True)
    failed = _failed(options.out) if summary.bad else []
    for name, reason in failed:
        log.say(f"  no mask: {name}: {reason}")
    if failed and summary.bad > len(failed):
        log.say(f"  no mask: {summary.bad - len(failed)} more, in {options.out / 'failed.parquet'}")
    if summary.bad > options.max_bad_fraction * summary.images:
        first = f", the first: {failed[0][0]}: {failed[0][1]}" if failed else ""
        print(f"stpp: {summary.bad} of {summary.images} images are bad, more than --max-bad-fraction "
              f"{options.max_bad_fraction}{first}; the good ones are done, the bad ones are listed with "
              f"their reasons in {options.out / 'failed.parquet'}", file=sys.stderr, flush=True)
        sys.exit(1)


def _failed(out: Path) -> list[tuple[str, str]]:
    """(image, reason) of the first bad images; empty while other parts are unfinished."""
    from stpp.label import rows

    path = out / "failed.parquet"
    table = rows.read(path, ("source", "error"), limit=REASONS) if path.exists() else []
    return [(row["source"], row["error"]) for row in table]


def refuse_inside(out: Path, source: str, flag: str = "--source") -> None:
    """Rejects an output folder inside the source: its masks would be taken for images.

    Raises:
        UserError: `out` lies in the source.
    """
    folder = Path(source).expanduser()
    if "://" not in source and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} is inside {flag} {source}: its masks would be taken for images; choose "
                        "another --out")


def report(summary: "Summary", out: Path, mean_name: str, classes: list[str]) -> str:
    """Result of a run as text."""
    from stpp import log

    lines = [f"{out}: {summary.images - summary.bad} images, {summary.bad} bad"]
    if summary.shards_left:
        lines[0] += f"; {summary.shards_left} shards of other parts are unfinished"
    if summary.mean is not None:
        lines[0] += f", {mean_name} {summary.mean:.4f}"
    if summary.class_pixels:
        ignored = summary.pixels - sum(summary.class_pixels)
        are_named = len(classes) == len(summary.class_pixels)
        names = classes if are_named else map(str, range(len(summary.class_pixels)))
        table = [("class", "pixels", "share")] + [
            (name, str(count), f"{100 * count / max(summary.pixels, 1):.2f} %")
            for name, count in zip([*names, "(ignored)"], [*summary.class_pixels, ignored], strict=True)]
        lines.append(log.table(table))
    rate = summary.labelled / max(summary.wall_s, 1e-9)
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in summary.seconds.items())
    lines.append(f"{summary.labelled} in this call, {summary.wall_s:.1f} s, {rate:.2f} images/s; summed over "
                 f"threads: {parts}")
    return "\n".join(lines)
