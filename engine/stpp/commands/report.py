"""`stpp report`: its flags, and what it says. Nothing heavy is imported before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from stpp import config
from stpp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a static page about a run or about pseudo labels; any browser opens its index.html from the
    disk."""

    folder: tyro.conf.Positional[Path]
    """The --out of `stpp train` or of `stpp label`."""
    out: Path | None = None
    """Folder of the report; by default `report` in the folder."""
    run: Path | None = None
    """With labels: the run of their teacher, for class names and the labelled set to compare with."""
    reliability: Path | None = None
    """With labels: reliability.parquet of `stpp select` on the same images."""
    pictures: int = 400
    """Images to draw, at most: the worst by every measure, and random ones."""


def report(args: Sequence[str]) -> None:
    """Runs `stpp report`.

    Raises:
        UserError: a folder or file is not what it should be.
    """
    options = config.parse(Report, args, prog="stpp report")
    for flag, path in (("", options.folder), ("--run ", options.run),
                       ("--reliability ", options.reliability)):
        if path is not None and not path.exists():
            raise UserError(f"{flag}{path}: there is no such file or folder")
    if options.pictures < 0:
        raise UserError(f"--pictures is {options.pictures}: it must be 0 or more")
    from stpp.report.build import write_report

    out = options.out or options.folder / "report"
    write_report(options.folder, out, run=options.run, reliability=options.reliability,
                 most_pictures=options.pictures)
    print(out / "index.html")
