"""`stpp calibrate`: how far a checkpoint's confidence can be trusted, and the thresholds that follow. Nothing
heavy is imported before it runs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stpp import config
from stpp.commands.evaluate import OnLabels, of_run, opened, run_of
from stpp.config import Config, Views
from stpp.errors import UserError

if TYPE_CHECKING:
    from stpp.inference.calibration import Calibration, Proposal


@dataclass(frozen=True, kw_only=True)
class Calibrate(OnLabels):
    """Measure how often pixels of a confidence are right on labels that a checkpoint was not trained on, and
    propose the least confidence for a wanted precision, in all and by class."""

    tta: Views | None = None
    """Views, as the labels will have; unset: those of the run that the checkpoint lies in (one view for
    UniMatch, which labels while it trains), or one view."""
    target_precision: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    """Shares of the pixels that are to be right; the last line of the output is for the first that is 0.95 or
    more, else for the largest."""
    out: Path | None = None
    """The JSON file; by default calibration.json beside the checkpoint, where `stpp label`, the report and
    the run look for it. A plot goes beside it, as SVG."""

    def __post_init__(self):
        super().__post_init__()
        if not self.target_precision or not all(0 < one < 1 for one in self.target_precision):
            given = " ".join(map(str, self.target_precision))
            raise UserError(f"--target-precision is {given or 'empty'}: each must be between 0 and 1")


def calibrate(args: Sequence[str]) -> None:
    """Runs `stpp calibrate`.

    Raises:
        UserError: no such checkpoint, index or list, classes that do not match, or labels without a pixel.
    """
    options = config.parse(Calibrate, args, prog="stpp calibrate")
    from stpp import distributed, files, log
    from stpp.inference import calibration
    from stpp.report.calibration import plot
    from stpp.run.lists import HELD_OUT

    run = run_of(options.checkpoint)
    if run and options.list is None and (run / HELD_OUT).is_file():
        options = dataclasses.replace(options, list=run / HELD_OUT)
    folder, listed = of_run(options, run)
    tta = options.tta or (_labelled_with(run) if run else "none")
    out = options.out or options.checkpoint.parent / calibration.NAME

    with distributed.world(options.compute.device) as here:
        log.set_speaker(here.is_main)
        ready = opened(options, folder, listed, here)
        found = calibration.measure(ready.predictor, ready.samples, here, ready.data, tta=tta,
                                    classes=ready.classes, weights=ready.weights)
        if here.is_main:
            print(report(found, options.target_precision, listed))
            calibration.write(out, found, options.target_precision)
            picture = out.with_suffix(".svg")
            files.write_text(picture, plot(found, title=str(options.checkpoint)))
            print(f"written: {out}, {picture}")


def _labelled_with(run: Path) -> str:
    """Views that a run labels with."""
    from stpp.methods import METHODS

    asked = config.load_recipe(Config, run / "config.json")
    return asked.label.tta if METHODS[asked.method].labels else "none"


def report(found: "Calibration", wanted: Sequence[float], listed: Path) -> str:
    """What a calibration says, in lines of text."""
    from stpp import log

    pixels = int(found.all_CB.sum())
    lines = [f"{found.images} images of {listed}, {pixels} labelled pixels, views: {found.tta}", ""]
    heads = [f"for {100 * one:g} %" for one in wanted]
    rows = [("predicted", "pixels", "right", "ECE", *heads)]
    for class_id, name in [(None, "all"), *enumerate(found.classes)]:
        accuracy, error = found.accuracy(class_id), found.error(class_id)
        count = pixels if class_id is None else int(found.all_CB[class_id].sum())
        cells = [_cell(found.proposal(one, class_id)) for one in wanted] if count else ["-"] * len(wanted)
        rows.append((name, str(count), "-" if accuracy is None else f"{100 * accuracy:.1f} %",
                     "-" if error is None else f"{error:.3f}", *cells))
    chosen = next((one for one in sorted(wanted) if one >= 0.95), max(wanted))
    lines += [log.table(rows), "", "ECE: expected calibration error, of 15 bins. A cell: least confidence, "
              "and the share of the class's pixels that it keeps; (!): the precision is not reached, the "
              "closest is shown; (?): too few pixels to tell.", "", *_flags(found, chosen)]
    return "\n".join(lines)


def _cell(one: "Proposal") -> str:
    mark = " (?)" if one.few else "" if one.reached else f" (!) {100 * one.precision:.0f} %"
    return f"{one.confidence:.3f}, {100 * one.coverage:.0f} %{mark}"


def _flags(found: "Calibration", precision: float) -> list[str]:
    """The proposals for a precision as flags."""
    overall = found.proposal(precision)
    own = {name: found.proposal(precision, i) for i, name in enumerate(found.classes)}
    pairs = " ".join(f"'{name}={one.confidence:g}'" if " " in name else f"{name}={one.confidence:g}"
                     for name, one in own.items() if one.reached and not one.few)
    unreached = [name for name, one in own.items() if not one.reached and not one.few]
    lines = [f"for a precision of {100 * precision:g} %:"]
    for flag, of_class in (("--label.min-confidence", "--label.class-confidence"),
                           ("--consistency.confidence", "--consistency.class-confidence")):
        both = [f"{flag} {overall.confidence:g}"] * overall.reached + [f"{of_class} {pairs}"] * bool(pairs)
        if both and (flag.startswith("--label") or found.tta == "none"):
            lines.append("  " + " ".join(both))
    if unreached:
        lines.append(f"  not reached by: {', '.join(unreached)}")
    return lines
