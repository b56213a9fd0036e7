"""Output of a run: messages and a progress bar on rank 0, metrics in JSONL and TensorBoard."""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from stpp import files

if TYPE_CHECKING:
    import numpy as np

_speaks = True


def set_speaker(speaks: bool) -> None:
    """Enables output in this process; only rank 0 prints."""
    global _speaks
    _speaks = speaks


def say(message: str) -> None:
    """Prints a line on rank 0, above the progress bar if one is active."""
    if _speaks:
        tqdm.write(message, file=sys.stderr)


def note(path: str | Path, row: dict) -> None:
    """Appends one JSON line to `path` on rank 0."""
    if _speaks:
        files.append(path, row)


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `every_s` seconds."""

    def __init__(self, title: str, total: int, *, unit: str = "images", done: int = 0, every_s: float = 10.0):
        self._title, self._total, self._unit, self._every_s = title, total, unit, every_s
        self._count = self._start_count = done
        self._start = self._last = time.monotonic()
        self._bar = None
        if _speaks and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=title, unit=f" {unit}", dynamic_ncols=True,
                             leave=False)

    def advance(self, count: int, **values: str) -> None:
        """Counts `count` more units; `values` are appended to the line, for example loss="0.31"."""
        self._count += count
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(count)
        elif _speaks and time.monotonic() - self._last >= self._every_s:
            self._last = time.monotonic()
            say(self._line(values))

    def _line(self, values: dict[str, str]) -> str:
        rate = (self._count - self._start_count) / max(time.monotonic() - self._start, 1e-9)
        left_s = (self._total - self._count) / max(rate, 1e-9)
        extra = "".join(f", {key} {value}" for key, value in values.items())
        return (f"  {self._title}: {self._count}/{self._total}, {rate:.1f} {self._unit}/s{extra}, "
                f"{left_s:.0f} s left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()


class Metrics:
    """`metrics.jsonl` and TensorBoard events of one stage, written by rank 0.

    A run resumed at step k drops the rows from k on, so each step occurs once in the file.
    """

    def __init__(self, folder: Path, *, first_step: int):
        self._path, self._events = folder / "metrics.jsonl", None
        if not _speaks:
            return
        # Rows up to the first step are kept and rewritten.
        kept = [line for line in _lines(self._path) if first_step and json.loads(line)["step"] <= first_step]
        files.write_text(self._path, "".join(line + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Adds one row; keys carry their unit, for example `images_per_s`."""
        if self._events is None:
            return
        note(self._path, {"step": step, **values})
        for key, value in values.items():
            self._events.add_scalar(key, value, step)

    def by_class(self, step: int, columns: Mapping[str, Mapping[str, float]]) -> None:
        """Adds a row of per-class values, such as `{"confident_pct": {"road": 31.0}}`; non-finite values are
        null and not plotted."""
        if self._events is None:
            return
        note(self._path, {"step": step} | {
            key: {name: round(value, 6) if math.isfinite(value) else None for name, value in values.items()}
            for key, values in columns.items()})
        self.show(step, values={f"{key}/{name}": value for key, values in columns.items()
                                for name, value in values.items()}, pictures={})

    def show(self, step: int, *, values: Mapping[str, float], pictures: "Mapping[str, np.ndarray]") -> None:
        """Adds values and pictures to TensorBoard only, without a row in the file.

        Args:
            values: by name; non-finite ones are skipped.
            pictures: uint8 [H, W, 3] by name.
        """
        if self._events is None:
            return
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        for name, picture_HWC in pictures.items():
            self._events.add_image(name, picture_HWC, step, dataformats="HWC")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._events is not None:
            self._events.close()  # otherwise the last two minutes of events are lost


def _lines(path: Path) -> list[str]:
    """Complete lines of a JSONL file; a last line truncated by a crash is skipped."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1].splitlines()


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns; the first row is the heading."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
