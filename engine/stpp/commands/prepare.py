"""`stpp prepare` and `stpp split`: the index of a data set, and which of its images keep their labels.

Nothing heavy is imported before one runs.
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
    """Processes that read files; unset: all cores."""
    strict: bool = False
    """Refuse what else is warned of."""


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


def prepare(args: Sequence[str]) -> None:
    """Runs `stpp prepare`.

    Raises:
        UserError: the data set is not as its layout says, or a file cannot be used.
    """
    options = config.parse(Prepare, args, prog="stpp prepare")
    data = options.data
    need_root(data)
    from stpp.dataset import card, index

    made = index.prepare(data.root, options.out, workers=options.workers, strict=options.strict,
                         **data.prepare_options())
    print(card.table(json.loads((options.out / card.JSON).read_text(encoding="utf-8"))))
    with_mask = sum(entry.mask is not None for entry in made.entries.values())
    print(f"{options.out}: {len(made.entries)} images, {with_mask} with a mask, "
          f"{len(made.classes)} classes")


def split(args: Sequence[str]) -> None:
    """Runs `stpp split`.

    Raises:
        UserError: no such index, or a fraction that it cannot give.
    """
    options = config.parse(Split, args, prog="stpp split")
    from stpp.dataset import index, splits

    splits.make_split(index.load(options.index), options.out, fraction=options.fraction, seed=options.seed,
                      val=options.val)
    for path in sorted(options.out.glob("*.txt")):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")
