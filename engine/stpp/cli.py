"""The command line: `stpp COMMAND ...`, also `python -m stpp COMMAND ...` under torchrun.

Nothing heavy is imported before a command runs, so that `--help` is instant.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from stpp import config, signals
from stpp.config import Config, DataConfig, SourceConfig
from stpp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Check a data set and write its index."""

    out: Path
    """Folder for index.parquet, index.json and re-encoded masks."""
    data: SourceConfig = field(default_factory=SourceConfig)
    workers: int | None = None
    """Processes that read files; unset: all cores."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Draw which images keep their labels: labeled.txt, unlabeled.txt, val.txt."""

    index: Path
    """Folder of a prepared index."""
    out: Path
    """Folder for the three lists."""
    fraction: str = "1/8"
    """Share (1/8, 0.125) or number (92) of the training images that keep their labels."""
    seed: int = 0
    """Equal seeds draw equal splits."""
    val: float | None = None
    """Share of the training images drawn for validation; unset: the data set's own validation list."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a checkpoint: mIoU and IoU of every class at native size."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    index: Path | None = None
    """Folder of a prepared index; by default that of the run that the checkpoint lies in."""
    list: Path | None = None
    """Lines `image mask`; by default val.txt of the run that the checkpoint lies in."""
    output_stride: Literal[8, 16, 32] | None = None
    """Of a checkpoint that does not tell it, such as a published one; unset: 8."""
    tta: Literal["none", "flip", "stpp"] = "none"
    """Test-time augmentation; with --sliding-window, of every crop."""
    sliding_window: int | None = None
    """Side in pixels of the crops that the network sees instead of the whole image, as is usual for Cityscapes. One begins at
    every two thirds of the side; probabilities are averaged where they overlap."""
    loader: Literal["auto", "dali", "reference"] = "auto"
    """Who decodes: DALI, or PIL and NumPy worker threads."""
    threads: int = 0
    """Threads that decode, per rank; 0: the machine's cores divided among its ranks."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type."""
    out: Path | None = None
    """Also write the scores to this JSON file."""

    def __post_init__(self):
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"--sliding-window is {self.sliding_window}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Compile:
    """Compile a checkpoint into an engine that labels faster: see docs/engines.md."""

    checkpoint: Path
    """A best.pt or third-*.pt of a run, or a published state dict."""
    out: Path
    """Folder of the engine; an engine that is there is replaced."""
    output_stride: Literal[8, 16, 32] | None = None
    """Of a checkpoint that does not tell it, such as a published one; unset: 8."""
    backend: Literal["auto", "tensorrt", "torch-tensorrt", "inductor", "eager"] = "auto"
    """Compiler; auto: the fastest that is installed."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of weights and feature maps."""
    shapes: tuple[str, ...] = ()
    """Smallest, typical and largest input as NxHxW, for example 1x32x32 4x360x480 16x1024x2048; views for test-time
    augmentation are up to twice as large as the images. By default any (inductor), or these."""
    sample: Path | None = None
    """Folder of images on which the engine must agree with eager; unset: the first images that it labels."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where the engine will run."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Make a small synthetic data set and run ST++ on it with two processes."""

    out: Path
    """Folder of the run."""
    seed: int = 0
    """Seed of the data, the split and the training."""
    control: bool = False
    """Also train on the labels alone for as many steps as the last stage has."""


def _prepare(args: list[str]) -> None:
    options = config.parse(Prepare, args, prog="stpp prepare")
    from stpp.dataset import index

    data = options.data
    _need_root(data)
    made = index.prepare(data.root, options.out, layout=data.layout, images=data.images, masks=data.masks,
                         classes=data.classes, mask_map=data.mask_map, exif=data.exif, unlabelled=data.unlabelled,
                         workers=options.workers)
    with_mask = sum(entry.mask is not None for entry in made.entries.values())
    print(f"{options.out}: {len(made.entries)} images, {with_mask} with a mask, {len(made.classes)} classes")


def _split(args: list[str]) -> None:
    options = config.parse(Split, args, prog="stpp split")
    from stpp.dataset import index, splits

    splits.make_split(index.load(options.index), options.out, fraction=options.fraction, seed=options.seed,
                      val=options.val)
    for path in sorted(options.out.glob("*.txt")):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")


def _train(args: list[str]) -> None:
    recipe, args = _take(args, "--recipe")
    print_config = "--print-config" in args
    args = [arg for arg in args if arg != "--print-config"]
    default = config.load_recipe(Config, Path(recipe)) if recipe else Config()
    resolved = config.parse(Config, args, prog="stpp train [--recipe FILE] [--print-config]", default=default)
    if print_config:
        import json

        print(json.dumps(config.to_dict(resolved), indent=2))
        return
    if resolved.out is None:
        raise UserError("--out is missing: name the folder of the run")
    _need_root(resolved.data)
    from stpp import distributed, log
    from stpp.run.run import selftrain

    with distributed.world(resolved.device, timeout_minutes=resolved.timeout_minutes) as here:
        log.set_speaker(here.is_main)
        selftrain(resolved, here)


def _evaluate(args: list[str]) -> None:
    options = config.parse(Evaluate, args, prog="stpp evaluate")
    if not options.checkpoint.is_file():
        raise UserError(f"--checkpoint {options.checkpoint}: no such file")
    from stpp import distributed, log
    from stpp.dataset import index, splits
    from stpp.inference import exif_rule
    from stpp.inference.evaluate import evaluate, report
    from stpp.inference.open import EagerTeacher
    from stpp.models.trained import load_network
    from stpp.precision import autocast_dtype

    folder, listed = _of_run(options)
    with distributed.world(options.device) as here:
        log.set_speaker(here.is_main)
        known = index.load(folder)
        data = DataConfig(exif=known.exif, loader=options.loader, threads=options.threads)
        samples = splits.read_split(listed, known, labelled=True)
        network, classes, _ = load_network(options.checkpoint, output_stride=options.output_stride, class_names=known.classes)
        if (rule := exif_rule.told(options.checkpoint)) not in (None, known.exif):
            raise UserError(f"{options.checkpoint} was trained on images {exif_rule.described(rule)}, and "
                            f"{folder} is of images {exif_rule.described(known.exif)}; prepare an index with "
                            f"--data.{'' if rule else 'no-'}exif")
        if tuple(classes) != tuple(known.classes):
            raise UserError(f"{options.checkpoint} was trained on {len(classes)} classes ({', '.join(classes)}) but "
                            f"{folder} has {len(known.classes)} ({', '.join(known.classes)}); use the matching index")
        teacher = EagerTeacher(network, num_classes=len(classes), device=here.device,
                               dtype=autocast_dtype(options.precision, here.device))
        matrix = evaluate(teacher, samples, here, data, mode=options.tta, crop_px=options.sliding_window)
        if here.is_main:
            print(report(matrix, classes, images=len(samples), out=options.out))


def _of_run(options: Evaluate) -> tuple[Path, Path]:
    """Index folder and list to score: as given, else those of the run that the checkpoint lies in."""
    from stpp.dataset import splits

    run = next((folder for folder in options.checkpoint.resolve().parents if (folder / "config.json").exists()), None)
    data = config.load_recipe(Config, run / "config.json").data if run else None
    folder = options.index or (data and (data.index or run / "index"))
    listed = options.list or (data and (splits.find_val(data.split) if data.split else run / "split" / splits.VAL))
    if folder is None or listed is None:
        raise UserError(f"--checkpoint {options.checkpoint} lies in no run; name a prepared index with --index and a file "
                        "with lines `image mask` with --list")
    return folder, listed


def _compile(args: list[str]) -> None:
    options = config.parse(Compile, args, prog="stpp compile")
    if not options.checkpoint.is_file():
        raise UserError(f"--checkpoint {options.checkpoint}: no such file")
    from stpp import distributed
    from stpp.inference import exif_rule
    from stpp.inference.open import Shapes, compile_teacher
    from stpp.inference.single_images import sample_images
    from stpp.models.trained import load_network

    shapes = Shapes.parse(options.shapes) if options.shapes else None
    with distributed.world(options.device) as here:
        if here.size > 1:
            raise UserError("stpp compile runs in one process; start it without torchrun")
        rule = exif_rule.agreed([options.checkpoint])
        sample = options.sample and sample_images(options.sample, here.device, exif=rule)
        compile_teacher(options.checkpoint, options.out, load=partial(load_network, output_stride=options.output_stride),
                        device=here.device, backend=options.backend, precision=options.precision, shapes=shapes, sample=sample)
    print(options.out)


def _demo(args: list[str]) -> None:
    options = config.parse(Demo, args, prog="stpp demo")
    from stpp.commands.demo import demo

    demo(options.out, seed=options.seed, control=options.control)


def _predict(args: list[str]) -> None:
    from stpp.commands import predict

    predict.predict(config.parse(predict.Predict, args, prog="stpp predict"))


def _export(args: list[str]) -> None:
    from stpp.commands import export

    export.export(config.parse(export.Export, args, prog="stpp export"))


def _label(args: list[str]) -> None:
    from stpp.commands import label

    label.label(config.parse(label.Label, args, prog="stpp label"))


def _select(args: list[str]) -> None:
    from stpp.commands import label

    label.select(config.parse(label.Select, args, prog="stpp select"))


def _report(args: list[str]) -> None:
    from stpp.commands import report

    report.report(config.parse(report.Report, args, prog="stpp report"))


def _doctor(args: list[str]) -> None:
    from stpp.commands import doctor

    doctor.doctor(config.parse(doctor.Doctor, args, prog="stpp doctor"))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "demo": (_demo, "make a small synthetic data set and run ST++ on it"),
    "prepare": (_prepare, "check a data set and write its index"),
    "split": (_split, "draw which images keep their labels"),
    "train": (_train, "run supervised training, ST or ST++"),
    "evaluate": (_evaluate, "score a checkpoint at native size"),
    "predict": (_predict, "write masks of a few images, and pictures of them"),
    "export": (_export, "write a checkpoint as ONNX"),
    "compile": (_compile, "compile a checkpoint into an engine that labels faster"),
    "label": (_label, "write pseudo labels of any number of images"),
    "select": (_select, "rank images by the agreement of several checkpoints"),
    "report": (_report, "write a page about a run or about pseudo labels"),
    "doctor": (_doctor, "say what this machine has, whether it works, and what to do"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Exits with 0 when it is done, 1 when it failed, 2 for the user's mistake, 130 and 143 when stopped."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        names = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
        print(f"usage: stpp COMMAND [--help] ...\n\nTrains a segmentation model from few labelled images and many "
              f"unlabelled ones.\n\n{names}\n\nSeveral processes: torchrun --nproc-per-node 8 -m stpp train ...")
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        from stpp import __version__

        print(f"stpp {__version__}")
        return
    try:
        if args[0] not in COMMANDS:
            raise UserError(f"no command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
        with signals.ending_on_term():
            COMMANDS[args[0]][0](args[1:])
    except UserError as error:
        if _is_heard():
            print(f"stpp: {error}", file=sys.stderr)
        _tell_torchrun(error.with_traceback(None))  # the line alone
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _tell_torchrun(error)
        raise


def _is_heard() -> bool:
    """Whether this rank prints the user's mistakes: most are found by all ranks, and torchrun's closing report names any."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or "TORCHELASTIC_ERROR_FILE" not in os.environ


def _tell_torchrun(error: Exception) -> None:
    """Leaves the error for torchrun's closing report, which is long and would else not say it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        try:
            get_error_handler().record_exception(error)
        except OSError:  # as on a full disk: torchrun cannot read half a file
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).unlink(missing_ok=True)


def _take(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag` (`--flag value` or `--flag=value`), and the other arguments."""
    for i, arg in enumerate(args):
        if arg == flag:
            if i + 1 == len(args):
                raise UserError(f"{flag} needs a file")
            return args[i + 1], args[:i] + args[i + 2:]
        if arg.startswith(flag + "="):
            return arg[len(flag) + 1:], args[:i] + args[i + 1:]
    return None, args


def _need_root(data: SourceConfig) -> None:
    if (data.layout == "globs") != (data.images is not None):
        raise UserError(f"--data.layout {data.layout} with --data.images {data.images}: patterns go with layout globs, "
                        "and globs needs them")
    if data.root is None:
        raise UserError("--data.root is missing: name the folder of the data set")
    if not data.root.is_dir():
        raise UserError(f"--data.root {data.root}: no such folder")
