"""`stpp report`: flags and checks. Heavy imports are deferred."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from stpp import config
from stpp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a static HTML report of a run or of pseudo labels; any browser opens its index.html offline."""

    folder: tyro.conf.Positional[Path]
    """The --out of `stpp train` or `stpp label`."""
    out: Path | None = None
    """Folder of the report; default: `report` in the folder."""
    run: Path | None = None
    """With labels: the run of their teacher, for class names and comparison with its labelled set."""
    reliability: Path | None = None
    """With labels: reliability.parquet of `stpp select` on the same images."""
    pictures: int = 400
    """Maximum number of images drawn: the worst by each measure, and random ones."""


def report(args: Sequence[str]) -> None:
    """Runs `stpp report`.

    Raises:
        UserError: an invalid folder or file.
    """
    options = config.parse(Report, args, prog="stpp report")
    for flag, path in (("", options.folder), ("--run ", options.run),
                       ("--reliability ", options.reliability)):
        if path is not None and not path.exists():
            raise UserError(f"{flag}{path}: no such file or folder")
    if options.pictures < 0:
        raise UserError(f"--pictures is {options.pictures}: it must be 0 or more")
    from stpp.report.build import write_report

    out = options.out or options.folder / "report"
    write_report(options.folder, out, run=options.run, reliability=options.reliability,
                 most_pictures=options.pictures)
    print(out / "index.html")
