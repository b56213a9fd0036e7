"""`stpp prepare` and `stpp split`: the index of a data set, and the draw of labelled images.

Heavy imports are deferred.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stpp import config
from stpp.commands.options import need_root
from stpp.config import SourceConfig


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Check a data set and write its index."""

    out: Path
    """Folder for index.parquet, index.json and re-encoded masks."""
    data: SourceConfig = SourceConfig()
    workers: int | None = None
    """Number of reader processes; default: all cores."""
    strict: bool = False
    """Treat warnings as errors."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Draw the images that keep their labels: labeled.txt, unlabeled.txt, val.txt."""

    index: Path
    """Folder of a prepared index."""
    out: Path
    """Folder for the three lists."""
    fraction: str = "1/8"
    """Fraction (1/8, 0.125) or number (92) of the training images that keep their labels."""
    seed: int = 0
    """Random seed; equal seeds draw equal splits."""
    val: float | None = None
    """Fraction of the training images drawn for validation; default: the data set's own validation list."""


def prepare(args: Sequence[str]) -> None:
    """Runs `stpp prepare`.

    Raises:
        UserError: the data set does not match its layout, or a file is unusable.
    """
    options = config.parse(Prepare, args, prog="stpp prepare")
    data = options.data
    need_root(data)
    from stpp.dataset import card, index

    prepared = index.prepare(data.root, options.out, workers=options.workers, strict=options.strict,
                         **data.prepare_options())
    print(card.table(json.loads((options.out / card.JSON).read_text(encoding="utf-8"))))
    with_mask = sum(entry.mask is not None for entry in prepared.entries.values())
    print(f"{options.out}: {len(prepared.entries)} images, {with_mask} with a mask, "
          f"{len(prepared.classes)} classes")


def split(args: Sequence[str]) -> None:
    """Runs `stpp split`.

    Raises:
        UserError: missing index, or an impossible fraction.
    """
    options = config.parse(Split, args, prog="stpp split")
    from stpp.dataset import index, splits

    splits.make_split(index.load(options.index), options.out, fraction=options.fraction, seed=options.seed,
                      val=options.val)
    for path in sorted(options.out.glob("*.txt")):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")
