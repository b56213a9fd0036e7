"""Export of a labelling's masks to annotation tools, through a writer of stpp.annotations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from stpp import files, processes
from stpp.annotations.labelled import LabelledImage, Scheme
from stpp.errors import UserError
from stpp.images.image_file import MAX_PIXELS, upright, upright_size
from stpp.images.masks import IGNORE, count_indices
from stpp.images.names import mask_key
from stpp.images.planning import examine_alone
from stpp.label import fingerprint, mask_files, rows
from stpp.label.mask_files import MaskFiles, MaskPlace

CHUNK = 16
"""Images passed to a worker process in one message."""
_COLUMNS = ("key", "source", "status", "width", "height", "mean_confidence")
Encode = Callable[[LabelledImage, np.ndarray, Scheme], Any]
"""Encoder of a mask, uint8 [H, W], in a tool's format."""


class Writer(AbstractContextManager, Protocol):
    """Writer of encoded images."""

    def add(self, image: LabelledImage, encoded: Any) -> None:
        """Writes an image."""
        ...


class Encoded(NamedTuple):
    """Encoded mask of an image."""

    image: LabelledImage
    mask: Any
    ignored: int
    """Pixels that are 255 (ignore)."""


@dataclass(kw_only=True)
class ExportCounts:
    """Counts of an export."""

    images: int = 0
    ignored: int = 0
    """Pixels that are 255 (ignore)."""
    with_ignored: int = 0
    """Images with such pixels."""


def export(labels: Path, writer: Writer, encode: Encode, scheme: Scheme, *, only: Path | None = None,
           workers: int | None = None, progress: bool = True) -> ExportCounts:
    """Exports every image of a labelling, part after part; memory does not grow with their number.

    Args:
        labels: folder with `labels/part-*.parquet` and `masks/`.
        only: list of the images to export, a key or a name per line; None: all.
        workers: number of processes; None: one per core.

    Raises:
        UserError: the folder has no labels; a mask is missing, broken or inconsistent with its row or the
            classes; or a line of the list names no labelled image.
    """
    parts = parts_of(labels)
    requested = None if only is None else _listed(only)
    matched: set[str] = set()
    total = ExportCounts()
    workers = min(workers or processes.cores(), max(1, len(parts)))
    chunks = _chunks(labels, parts, requested, matched)
    died = "a process that encodes masks died; if it was killed for lack of memory, give it more"
    with writer, tqdm(desc="export", unit="image", disable=not progress, dynamic_ncols=True) as bar:
        for chunk in processes.in_order(encode_many, chunks, (encode, scheme), workers, died=died):
            bar.update(len(chunk))
            for image, mask, ignored in chunk:
                writer.add(image, mask)
                total.images += 1
                total.ignored += ignored
                total.with_ignored += ignored > 0
        missing = sorted(set(requested or ()) - matched)
        if missing:
            raise UserError(f"--only {only}: {len(missing)} lines name no labelled image, the first: "
                            f"{missing[0][:120]!r}")
        if not total.images:
            raise UserError(f"{labels}: no image in it has a mask")
    return total


def parts_of(labels: Path) -> list[Path]:
    """Lists the table parts of a labelling.

    Raises:
        UserError: there are none, or a finished labelling lacks one.
    """
    parts = rows.parts(labels, "labels")
    if not parts:
        raise UserError(f"{labels}: holds no labels (labels/part-*.parquet); give the --out of `stpp label`, "
                        "or a labelling stage of a run, for example RUN/stages/3-label")
    return parts


def encode_many(chunk: Sequence[tuple[LabelledImage, MaskPlace]], encode: Encode,
                scheme: Scheme) -> list[Encoded]:
    """Reads and encodes masks, in order.

    Raises:
        UserError: a mask is broken, or inconsistent with its row or the classes.
    """
    encoded = []
    for image, place in chunk:
        mask_HW = np.ascontiguousarray(upright(mask_files.read(place), image.turn))
        if mask_HW.shape != (image.height, image.width):
            raise UserError(f"{place.file}: the mask of {image.key} has "
                            f"{mask_HW.shape[1]}x{mask_HW.shape[0]} pixels, but its row says "
                            f"{image.width}x{image.height}")
        counts = count_indices(mask_HW)
        unknown = np.flatnonzero(counts[len(scheme.names) : IGNORE])
        if unknown.size:
            raise UserError(f"{place.file}: the mask of {image.key} holds the class id "
                            f"{unknown[0] + len(scheme.names)}, and there are {len(scheme.names)} classes; "
                            "give all with --classes")
        encoded.append(Encoded(image, encode(image, mask_HW, scheme), int(counts[IGNORE])))
    return encoded


def _chunks(labels: Path, parts: Sequence[Path], requested: dict[str, None] | None,
            matched: set[str]) -> Iterator[list[tuple[LabelledImage, MaskPlace]]]:
    """Yields chunks of images to export; adds the matching lines of the list to `matched`."""
    as_stored = _is_as_stored(labels)
    for part in parts:
        masks, chunk = MaskFiles(labels, part.stem), []
        turn_of = _orientations(labels, part) if as_stored else {}
        for row in rows.read(part, _COLUMNS):
            if row["status"] != "ok":
                continue
            image = _labelled(row, part, turn_of.get(row["key"], 1))
            if requested is not None:
                lines = {line for line in (image.key, image.name) if line in requested}
                matched |= lines
                if not lines:
                    continue
            try:
                chunk.append((image, masks.place(image.key)))
            except KeyError:
                raise UserError(f"{labels}: the mask of {image.key} is missing; label it again (`stpp label "
                                "--verify`)") from None
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def _is_as_stored(labels: Path) -> bool:
    """True if images were labelled without regard to their EXIF orientation."""
    stored = fingerprint.read(labels) or {}
    cut = stored.get("fingerprint", {}).get("cut", {}) if isinstance(stored.get("fingerprint"), dict) else {}
    return isinstance(cut, dict) and cut.get("exif") is False


def _orientations(labels: Path, part: Path) -> dict[str, int]:
    """Reads the EXIF orientations of a part's images, by key.

    Raises:
        UserError: an image can no longer be read.
    """
    turn_of = {}
    for row in rows.read(labels / "plan" / part.name):
        item = rows.item(row)
        examined = examine_alone(item, max_pixels=MAX_PIXELS, exif=True)
        if examined.error is None:
            turn_of[item.key] = examined.reading.orientation
        elif row.get("error") is None:
            raise UserError(f"{item.source}: cannot be read ({examined.error}); it was labelled as "
                            "stored, and an export needs its EXIF orientation")
    return turn_of


def _labelled(row: dict, part: Path, turn: int) -> LabelledImage:
    """Converts a row to an image, checking that its key is a safe path."""
    key, source = row["key"], row["source"] or ""
    try:
        safe = mask_key(f"{key}.png") == key
    except ValueError:
        safe = False
    if not safe or not row["width"] or not row["height"]:
        raise UserError(f"{part}: the row of {key[:120]!r} is damaged; label it again")
    stem, dot, ending = source.rpartition("/")[2].rpartition(".")
    name = f"{key}.{ending}" if dot and stem and len(ending) <= 5 and ending.isalnum() else key
    score = row["mean_confidence"]
    known = score is not None and 0 <= score <= 1
    return LabelledImage(key, name, *upright_size(row["width"], row["height"], turn), score if known else 0.0,
                         turn)


def _listed(path: Path) -> dict[str, None]:
    """Reads the lines of a list, in order.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        lines = dict.fromkeys(line.strip() for line in files.read_text(path).split("\n") if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"--only {path}: cannot be read as a list of images ({error})") from None
    if not lines:
        raise UserError(f"--only {path}: lists no image")
    return lines
