"""`stpp label` and `stpp select`: their flags, and what they say. Nothing heavy is imported before one
runs."""

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

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
REASONS = 5
"""Bad images that are named on the terminal."""


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(LabelConfig):
    """Flags that both commands share."""

    source: str
    """A folder (with its sub-folders), a list file, or tar archives (shards/{000..127}.tar); a path or a URL
    of fsspec."""
    out: Path
    """Folder of the result; the same command on it goes on where it stopped."""
    root: Path | None = None
    """With a list: what its relative paths are relative to; by default its own folder."""
    tar_folders: bool = False
    """With archives: a folder of masks for each, where their members have equal names."""
    part: str = "1/1"
    """i/n: only every n-th shard, where machines share no torchrun; all n parts make the whole."""
    verify: bool = False
    """Also look for missing, truncated or altered files of finished shards, and do those again."""
    update: bool = False
    """Label just what is new or changed since the source was listed; masks of images that are gone go."""
    list_only: bool = False
    """Only list the source and check its names: one process does that, and needs no GPU. Then the same
    command without this."""
    max_bad_fraction: float = 0.01
    """With more bad images than this share, exit with 1 at the end; the good ones are done all the same."""
    exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Turn images upright by their EXIF orientation. Without this and --no-exif: as the network was trained,
    which a checkpoint of a run tells; upright where it tells nothing."""
    no_exif: tyro.conf.FlagCreatePairsOff[bool] = False
    """Read images as they are stored."""
    compute_threads: int = 0
    """Threads that compute on a CPU, per rank; 0: those the run was begun with, or the cores divided among
    the ranks."""
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
    """Write pseudo labels of any number of images with a trained network."""

    teacher: Path
    """A best.pt or third-*.pt of a run, a published state dict, or the folder of an engine that
    `stpp compile` made."""
    output_stride: OutputStride = None
    output: Literal["png", "tar"] = "png"
    """A PNG file for every mask, or one tar archive for every shard."""
    target_precision: float | None = None
    """With --min-confidence auto: share of the pixels of each class whose label is to be right."""
    calibration: Path | None = None
    """With --min-confidence auto: what `stpp calibrate` wrote; by default calibration.json beside the
    teacher."""

    def __post_init__(self):
        super().__post_init__()
        auto = self.min_confidence == "auto"
        if self.target_precision is not None and not 0 < self.target_precision < 1:
            raise UserError(f"--target-precision is {self.target_precision}: it must be between 0 and 1")
        if auto != (self.target_precision is not None) or (self.calibration is not None and not auto):
            raise UserError("--min-confidence auto and --target-precision go together, and --calibration "
                            "goes with both; for example, --min-confidence auto --target-precision 0.95")


@dataclass(frozen=True, kw_only=True)
class Select(CorpusOptions):
    """Rank images by how well several checkpoints agree (one view each), and halve the list: reliable
    first."""

    checkpoints: tuple[Path, ...]
    """Checkpoints of one run in the order of training; the last one judges. ST++ takes third-1.pt third-2.pt
    third-3.pt."""


def label(args: Sequence[str]) -> None:
    """Runs `stpp label`."""
    options = config.parse(Label, args, prog="stpp label")

    def work(open_teachers, task, here) -> "Summary":
        from stpp.label.labels import label_corpus

        return label_corpus(open_teachers, task, here, floors=floors)

    def floors(teacher: "OpenedPredictor") -> tuple[float, ...]:
        return _floors(options, teacher)

    _run(options, [options.teacher], options.tta, work, "mean confidence", output=options.output,
         output_stride=options.output_stride)


def _floors(options: Label, teacher: "OpenedPredictor") -> tuple[float, ...]:
    """Least confidence by class; empty where all have one.

    Raises:
        UserError: a class that does not exist, or no calibration of this teacher with these views.
    """
    least = options.min_confidence
    if least == "auto":
        from stpp.inference import calibration
        from stpp.run.calibrated import floors_of

        path = options.calibration or options.teacher.parent / calibration.NAME
        found = calibration.read(path)
        if found.tta != options.tta or not teacher.identity.startswith(found.weights[:16]):
            other = "other weights" if found.tta == options.tta else f"{found.tta} views"
            raise UserError(f"{path} is of {other}; run `stpp calibrate --checkpoint {options.teacher} --tta "
                            f"{options.tta}`")
        least = floors_of(found, options.target_precision)
    elif not options.class_confidence:
        return ()
    return by_class.filled(options.class_confidence, "class-confidence", teacher.classes, least)


def select(args: Sequence[str]) -> None:
    """Runs `stpp select`."""
    options = config.parse(Select, args, prog="stpp select")
    if len(options.checkpoints) < 2:
        raise UserError(f"--checkpoints: {len(options.checkpoints)} given; two or more are compared")

    def work(open_teachers, task, here) -> "Summary":
        from stpp.label.reliability import select_corpus

        return select_corpus(open_teachers, task, here)

    _run(options, options.checkpoints, "none", work, "mean reliability", title="select", table="scores")


def _run(options: CorpusOptions, paths: Sequence[Path], mode: str, work: Callable[..., "Summary"], mean: str,
         *, output_stride: int | None = None, **more: str) -> None:
    """Runs a command on this rank and says how it ended.

    Args:
        more: fields of the `Assignment` that are the command's own.

    Raises:
        UserError: a mistake in what was given, or an output that may not be written.
        SystemExit: 1 if too many images are bad, or there is no room for the output.
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
            raise UserError(f"{path}: there is no such checkpoint or engine")
    classes: list[str] = []
    with distributed.world(options.compute.device) as here:
        log.set_speaker(here.is_main)
        log.say(f"operators: {describe_implementations(here.device.type)}")
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
            if here.is_main:
                raise
            sys.exit(2)  # every rank finds the same; one says it
        open_all = predictors.from_paths(paths, here.device, mode=mode, backend=options.backend,
                                         precision=options.compute.precision,
                                         trust=options.trust_engine, output_stride=output_stride,
                                         view_px=options.view_px)

        def opened(images: int) -> list:
            found = open_all(images)
            classes.extend(found[0].classes)
            return found

        task = Assignment(source=source, out=options.out, config=options, part=part, verify=options.verify,
                          data=DataConfig(exif=exif, loader=options.reading.loader,
                                          threads=options.reading.threads),
                          update=options.update, list_only=options.list_only, **more)
        try:
            summary = work(opened, task, here)
        except OSError as error:
            if error.errno in _DENIED:
                raise UserError(f"--out {options.out}: {files.why(error)}; choose a folder that can be "
                                "written") from None
            if error.errno not in _NO_ROOM:
                raise
            print(f"stpp: --out {options.out}: {error.strerror}; make room and run the same command again: "
                  "finished shards are kept", file=sys.stderr, flush=True)
            sys.exit(1)
        if here.is_main:
            _end(options, summary, mean, classes)


def _end(options: CorpusOptions, summary: "Summary", mean: str, classes: list[str]) -> None:
    """Says how a run ended; exits with 1 if too many images are bad."""
    from stpp import log

    if options.list_only:
        print(f"{options.out}: {summary.listed} images listed, {summary.shards_left} shards to do, "
              f"{summary.wall_s:.1f} s",
              flush=True)
        return
    print(report(summary, options.out, mean, classes), flush=True)
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
    """(image, reason) of the first bad images; none while other parts are still to be done."""
    from stpp.label import rows

    path = out / "failed.parquet"
    table = rows.read(path, ("source", "error"), most=REASONS) if path.exists() else []
    return [(row["source"], row["error"]) for row in table]


def refuse_inside(out: Path, source: str, called: str = "--source") -> None:
    """Refuses an output below the source: its masks would be taken for images.

    Raises:
        UserError: it is there.
    """
    folder = Path(source).expanduser()
    if "://" not in source and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {out} lies in {called} {source}: its masks would be taken for images; choose "
                        "another --out")


def report(summary: "Summary", out: Path, mean: str, classes: list[str]) -> str:
    """What a run ended with, in lines of text."""
    from stpp import log

    lines = [f"{out}: {summary.images - summary.bad} images, {summary.bad} bad"]
    if summary.shards_left:
        lines[0] += f"; {summary.shards_left} shards of other parts are still to be done"
    if summary.mean is not None:
        lines[0] += f", {mean} {summary.mean:.4f}"
    if summary.class_pixels:
        ignored = summary.pixels - sum(summary.class_pixels)
        names = (
            classes
            if len(classes) == len(summary.class_pixels)
            else map(str, range(len(summary.class_pixels)))
        )
        table = [("class", "pixels", "share")] + [
            (name, str(count), f"{100 * count / max(summary.pixels, 1):.2f} %")
            for name, count in zip([*names, "(ignored)"], [*summary.class_pixels, ignored], strict=True)]
        lines.append(log.table(table))
    rate = summary.labelled / max(summary.wall_s, 1e-9)
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in summary.seconds.items())
    lines.append(f"{summary.labelled} in this call, {summary.wall_s:.1f} s, {rate:.2f} images/s; over all "
                 f"threads: {parts}")
    return "\n".join(lines)
