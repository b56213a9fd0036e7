"""`stpp export-labels`: labels for review and correction in annotation tools. Heavy imports are deferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from stpp import config, files
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.annotations.labelled import Scheme
    from stpp.label.export import Encode, ExportCounts, Writer

MOST_CLASSES = 254
_HOLD_IGNORED = ("cvat",)


@dataclass(frozen=True, kw_only=True)
class ExportLabels:
    """Export labels to the format of an annotation tool."""

    labels: tyro.conf.Positional[Path]
    """The --out of `stpp label`, or a labelling stage of a run (RUN/stages/3-label)."""
    format: Literal["cvat", "coco", "label-studio", "yolo"]
    """cvat: Segmentation mask 1.1; coco: JSON of objects; label-studio: predictions with brushes; yolo:
    polygons."""
    out: Path
    """cvat, yolo: a folder, or a .zip archive; coco: a .json file; label-studio: a .json file, or a folder of
    several."""
    only: Path | None = None
    """List of images to export, such as those ticked in the report; default: all."""
    min_area: int = 0
    """Smallest exported object, in pixels."""
    polygons: bool = False
    """With coco: polygons along pixel edges instead of run lengths; both are exact."""
    image_prefix: str | None = None
    """With label-studio: prefix of image names, such as s3://bucket/; default: Label Studio's local files."""
    classes: tuple[str, ...] = ()
    """Class names in id order, if neither the labels nor their run record them."""
    run: Path | None = None
    """Run of the labels' teacher, for the class names."""
    workers: int | None = None
    """Number of processes; default: all cores."""


def export_labels(args: Sequence[str]) -> None:
    """Runs `stpp export-labels`.

    Raises:
        UserError: invalid labels or output.
    """
    options = config.parse(ExportLabels, args, prog="stpp export-labels")
    _check(options)
    from stpp.annotations import trees
    from stpp.annotations.labelled import Scheme
    from stpp.label.export import export, parts_of

    trees.refuse_existing(options.out)
    parts_of(options.labels)
    scheme = Scheme(names=_names(options), min_area=options.min_area)
    encode, writer = _format(options, scheme)
    try:
        done = export(options.labels, writer, encode, scheme, only=options.only, workers=options.workers)
    except OSError as error:
        raise UserError(f"--out {options.out}: {files.describe_error(error)}; make room, or choose another "
                        f"--out") from None
    _say(options, done)


def _check(options: ExportLabels) -> None:
    if not options.labels.is_dir():
        raise UserError(f"{options.labels}: no such folder")
    if options.min_area < 0:
        raise UserError(f"--min-area is {options.min_area}: it must be 0 or more")
    for flag, value, wanted in (("--polygons", options.polygons, "coco"),
                                ("--image-prefix", options.image_prefix, "label-studio")):
        if value and options.format != wanted:
            raise UserError(f"{flag}: needs --format {wanted}, not {options.format}")
    if options.format == "coco" and options.out.suffix.lower() != ".json":
        raise UserError(f"--out {options.out}: a COCO file must end in .json")


def _names(options: ExportLabels) -> tuple[str, ...]:
    """Class names from the flag, the labels or their run, in this order."""
    from stpp.label import fingerprint
    from stpp.report import run as runs

    run = options.run or runs.of_labels(options.labels)
    stored = fingerprint.read(options.labels) or {}
    names = options.classes or stored.get("classes") or (run and runs.classes(run)) or ()
    if options.run is not None and not runs.classes(options.run):
        raise UserError(f"--run {options.run}: not a run that records its classes")
    if options.run is not None and not options.classes and list(names) != list(runs.classes(options.run)):
        raise UserError(f"--run {options.run}: its classes differ from those of the network that labelled "
                        f"{options.labels}; leave the flag out, or give --classes")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names) or not names:
        raise UserError(f"{options.labels}: the class names are unknown; give --classes in id order, or "
                        "--run")
    recorded = stored.get("classes") or ()
    if options.classes and isinstance(recorded, list) and recorded and len(recorded) != len(names):
        raise UserError(f"--classes: got {len(names)} names, and the network that labelled {options.labels} "
                        f"has {len(recorded)} classes")
    if len(set(names)) < len(names) or len(names) > MOST_CLASSES:
        raise UserError(f"--classes: expected up to {MOST_CLASSES} distinct names, got {len(names)} "
                        f"({len(set(names))} distinct)")
    odd = next((name for name in names if not name.isprintable() or not name.strip()), None)
    if options.format == "cvat":
        from stpp.annotations.labelled import IGNORED

        odd = next((name for name in names if ":" in name or name.startswith("#") or name == IGNORED), odd)
    if odd is not None:
        raise UserError(f"--classes: {options.format} cannot store the name {odd!r}; choose another")
    return tuple(names)


def _format(options: ExportLabels, scheme: "Scheme") -> tuple["Encode", "Writer"]:
    from stpp.annotations import to_coco, to_cvat, to_label_studio, to_yolo

    if options.format == "coco":
        encode = to_coco.encode_polygons if options.polygons else to_coco.encode
        return encode, to_coco.CocoWriter(options.out, scheme)
    if options.format == "label-studio":
        prefix = to_label_studio.LOCAL_FILES if options.image_prefix is None else options.image_prefix
        return to_label_studio.encode, to_label_studio.LabelStudioWriter(options.out, scheme, prefix)
    if options.format == "yolo":
        return to_yolo.encode, to_yolo.YoloWriter(options.out, scheme)
    return to_cvat.encode, to_cvat.CvatWriter(options.out, scheme)


def _say(options: ExportLabels, done: "ExportCounts") -> None:
    from stpp import log

    if not (options.labels / "summary.json").exists():
        log.say(f"warning: {options.labels}: labelling is unfinished; only finished images were exported")
    if done.ignored and options.format not in _HOLD_IGNORED:
        log.say(f"{done.ignored} pixels of {done.with_ignored} images are ignored (255), which "
                f"{options.format} cannot store: they belong to no object; --format cvat keeps them")
    print(f"{options.out}: {done.images} images")
