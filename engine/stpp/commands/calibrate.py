"""`stpp calibrate`: calibration of a checkpoint's confidences, and thresholds from it. Heavy imports are
deferred."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stpp import config
from stpp.commands.evaluate import ScoringOptions, index_and_list, open_checkpoint, run_of
from stpp.config import Config, Views
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.inference.calibration import Calibration, Proposal


@dataclass(frozen=True, kw_only=True)
class Calibrate(ScoringOptions):
    """Measure the accuracy of a checkpoint's confidences on held-out labels, and propose confidence
    thresholds for target precisions, overall and per class."""

    tta: Views | None = None
    """Test-time views, the same as for labelling; default: those of the checkpoint's run (one view for
    UniMatch, which labels during training), or one view."""
    target_precision: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    """Target shares of correct pixels. The flags printed last are for the lowest target of at least 0.95,
    otherwise for the highest."""
    out: Path | None = None
    """JSON file; default: calibration.json in the checkpoint's folder, where `stpp label`, the report and the
    run look for it. An SVG plot is written next to it."""

    def __post_init__(self):
        super().__post_init__()
        if not self.target_precision or not all(0 < target < 1 for target in self.target_precision):
            targets = " ".join(map(str, self.target_precision))
            raise UserError(f"--target-precision is {targets or 'empty'}: each must be between 0 and 1")


def calibrate(args: Sequence[str]) -> None:
    """Runs `stpp calibrate`.

    Raises:
        UserError: missing checkpoint, index or list, mismatched classes, or labels without a pixel.
    """
    options = config.parse(Calibrate, args, prog="stpp calibrate")
    from stpp import distributed, files, log
    from stpp.inference import calibration
    from stpp.report.calibration import plot
    from stpp.run.lists import HELD_OUT

    run = run_of(options.checkpoint)
    if run and options.list is None and (run / HELD_OUT).is_file():
        options = dataclasses.replace(options, list=run / HELD_OUT)
    folder, list_path = index_and_list(options, run)
    tta = options.tta or (_labelled_with(run) if run else "none")
    out = options.out or options.checkpoint.parent / calibration.NAME
    if out.suffix == ".svg":
        raise UserError(f"--out {out}: is the name of the plot; give a name that ends in .json")
    files.require_writable(out, "--out")

    with distributed.world(options.compute.device) as world:
        log.set_speaker(world.is_main)
        checkpoint = open_checkpoint(options, folder, list_path, world)
        measured = calibration.measure(checkpoint.predictor, checkpoint.samples, world, checkpoint.data,
                                       tta=tta, classes=checkpoint.classes, network=checkpoint.network)
        if world.is_main:
            print(report(measured, options.target_precision, list_path))
            calibration.write(out, measured, options.target_precision)
            picture = out.with_suffix(".svg")
            files.write_text(picture, plot(measured, title=str(options.checkpoint)))
            print(f"written: {out}, {picture}")


def _labelled_with(run: Path) -> str:
    """Views that a run labels with."""
    from stpp.methods import METHODS

    recipe = config.load_recipe(Config, run / "config.json")
    return recipe.label.tta if METHODS[recipe.method].labels else "none"


def report(measured: "Calibration", targets: Sequence[float], list_path: Path) -> str:
    """Calibration table and proposed flags as text."""
    from stpp import log

    pixels = int(measured.all_CB.sum())
    lines = [f"{measured.images} images of {list_path}, {pixels} labelled pixels, views: {measured.tta}", ""]
    headings = [f"for {100 * target:g} %" for target in targets]
    rows = [("predicted", "pixels", "right", "ECE", *headings)]
    for class_id, name in [(None, "all"), *enumerate(measured.classes)]:
        accuracy, error = measured.accuracy(class_id), measured.error(class_id)
        count = pixels if class_id is None else int(measured.all_CB[class_id].sum())
        cells = ["-"] * len(targets)
        if count:
            cells = [_cell(measured.proposal(target, class_id)) for target in targets]
        rows.append((name, str(count), "-" if accuracy is None else f"{100 * accuracy:.1f} %",
                     "-" if error is None else f"{error:.3f}", *cells))
    flag_target = next((target for target in sorted(targets) if target >= 0.95), max(targets))
    lines += [log.table(rows), "", "ECE: expected calibration error (15 bins). Cells: confidence threshold, "
              "share of the class's pixels kept; (!): target not reached, closest precision shown; "
              "(?): too few pixels.", "", *_flags(measured, flag_target)]
    return "\n".join(lines)


def _cell(proposal: "Proposal") -> str:
    mark = " (?)" if proposal.few else "" if proposal.reached else f" (!) {100 * proposal.precision:.0f} %"
    return f"{proposal.confidence:.3f}, {100 * proposal.coverage:.0f} %{mark}"


def _flags(measured: "Calibration", precision: float) -> list[str]:
    """Proposed thresholds for a precision, as flags."""
    overall = measured.proposal(precision)
    by_class = {name: measured.proposal(precision, i) for i, name in enumerate(measured.classes)}
    pairs = " ".join(f"'{name}={proposal.confidence:g}'" if " " in name else f"{name}={proposal.confidence:g}"
                     for name, proposal in by_class.items() if proposal.reached and not proposal.few)
    unreached = [name for name, proposal in by_class.items() if not proposal.reached and not proposal.few]
    lines = [f"for a precision of {100 * precision:g} %:"]
    for flag, of_class in (("--label.min-confidence", "--label.class-confidence"),
                           ("--consistency.confidence", "--consistency.class-confidence")):
        flags = [f"{flag} {overall.confidence:g}"] * overall.reached + [f"{of_class} {pairs}"] * bool(pairs)
        if flags and (flag.startswith("--label") or measured.tta == "none"):
            lines.append("  " + " ".join(flags))
    if unreached:
        lines.append(f"  not reached by: {', '.join(unreached)}")
    return lines
