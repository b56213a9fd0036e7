"""Checks of single images and masks, run in parallel on all cores.

This module imports neither torch nor pyarrow, so that worker processes start quickly.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stpp import files, processes
from stpp.annotations import readers
from stpp.annotations.shapes import Legend, ShapeSource, draw
from stpp.dataset.mask_judge import Edges, edges
from stpp.dataset.mask_map import MANY, MaskMap
from stpp.errors import UserError
from stpp.images.containers import looks_whole
from stpp.images.image_file import DECODE_ERRORS, upright, upright_size
from stpp.images.masks import IGNORE, Stored, count_indices, read_mask, write_index_png
from stpp.images.pixels import BadImage
from stpp.images.reading import DecodeFindings, Reading, check_decodable

_CHUNK = 32
"""Images per message to a worker process: large enough for cheap messages, small enough to keep all cores
busy at the end."""


@dataclass(frozen=True, slots=True)
class Task:
    """An image to check, with its mask."""

    key: str
    image: str
    mask: str | None
    bytes: int
    """Size of the image; -1 if it is not a readable file. The same holds for the other stamps."""
    mtime_ns: int
    mask_bytes: int | None = None
    mask_mtime_ns: int | None = None
    shapes: ShapeSource | None = None
    """Location of the shapes in the file `mask`, from which the mask is drawn; None: `mask` is a mask."""
    listed: str | None = None
    """See FoundImage."""


@dataclass(frozen=True, slots=True)
class Checked:
    """Result of a check: an index entry, or problems."""

    task: Task
    reading: Reading | None = None
    """None if there are problems."""
    used_bits: int = 0
    """Bits that the image uses; see `stpp.images.reading.check_decodable`."""
    like_mask: bool = False
    """True if the image looks like a mask; see `stpp.images.reading.check_decodable`."""
    orientation: int = 1
    """EXIF orientation of the image file, 1 to 8, whether applied or not."""
    converted: str | None = None
    """Path of the re-encoded mask, relative to the index's folder."""
    class_pixels: list[int] | None = None
    problems: tuple[str, ...] = ()
    ignored: int = 0
    """Mask pixels that are 255."""
    stored: Stored | None = None
    """Storage of the ids in the mask; None for drawn masks."""
    doubtful: tuple[str, ...] = ()
    """Descriptions of the shapes whose pixels became 255."""
    crowds: int = 0
    """Number of crowd shapes."""
    edges: Edges | None = None
    digest: bytes = b""
    """SHA-256 of the image's bytes."""
    mask_digest: bytes = b""
    """SHA-256 of the mask's size and class ids; empty without a mask."""


def check_all(tasks: list[Task], arguments: tuple, workers: int | None = None) -> Iterator[list[Checked]]:
    """Checks tasks on all cores; yields results in chunks, in order.

    Args:
        tasks: images to check.
        arguments: arguments of `check` after the task.
        workers: number of processes; None: one per core. Small task lists run in this process, because
            starting workers would take longer.
    """
    chunks = (tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK))
    workers = min(workers or processes.cores(), max(1, len(tasks) // (4 * _CHUNK)))
    died = ("a process that reads images died; if it ran out of memory, use fewer --data.threads")
    yield from processes.in_order(check_many, chunks, arguments, workers, died=died)


def check_many(tasks: list[Task], *arguments) -> list[Checked]:
    """Checks tasks in order."""
    return [check(task, *arguments) for task in tasks]


def check(task: Task, root: str, out: str, classes: int, exif: bool,
          meaning: MaskMap | Legend | None = None) -> Checked:
    """Decodes an image and its mask, compares them, and re-encodes the mask below `out` unless it is plain.

    Args:
        task: paths relative to the root.
        root: the data root.
        out: the index's folder.
        classes: number of classes; a mask may hold 0 .. classes - 1 and 255.
        exif: the EXIF rule, see stpp.images.image_file.
        meaning: mapping of mask values or colours, or of shape labels, to classes; None: values are class
            ids.
    """
    if task.shapes is not None:
        return _check_drawn(task, root, out, classes, exif, meaning)
    seen, proof, digest, mask, problems = None, None, None, None, []
    try:
        seen, proof, digest = _look(os.path.join(root, task.image))
    except UserError as error:
        problems.append(_relative(error, root))
    if task.mask is not None:
        try:
            mask = read_mask(os.path.join(root, task.mask), exif=exif, mask_map=meaning)
        except UserError as error:
            problems.append(_relative(error, root))
    counts = None
    if mask is not None:
        counts = count_indices(mask.values)
        problems += _mask_problems(task.mask, mask.stored, counts, classes)
    if seen is None:
        return Checked(task, problems=tuple(problems))
    reading, other = (seen, seen.as_stored()) if exif else (seen.as_stored(), seen)
    if mask is not None and mask.values.shape != reading.size:
        problems.append(_size_problem(task, reading, other, mask.values.shape[::-1], mask.turn, exif))
    if problems:
        return Checked(task, problems=tuple(problems))
    converted = None if mask is None or mask.plain else _written(task, out, mask.values)
    of_mask = {} if mask is None else {
        "converted": converted, "class_pixels": counts[:classes].tolist(), "ignored": int(counts[IGNORE]),
        "stored": mask.stored, "edges": edges(mask.values), "mask_digest": _digest(mask.values)}
    return Checked(task, reading, proof.used_bits, proof.like_mask, seen.orientation, digest=digest,
                   **of_mask)


def _check_drawn(task: Task, root: str, out: str, classes: int, exif: bool, legend: Legend) -> Checked:
    """`check` for an image whose mask is drawn from shapes."""
    try:
        seen, proof, digest = _look(os.path.join(root, task.image))
        frame = seen.as_stored() if legend.stored else seen
        annotated = readers.read(task.shapes, os.path.join(root, task.mask), frame.width, frame.height)
    except UserError as error:
        return Checked(task, problems=(_relative(error, root),))
    if annotated.size is not None and annotated.size != (frame.width, frame.height):
        other = seen if legend.stored else seen.as_stored()
        return Checked(task, problems=(_frame_problem(task, annotated.size, frame, other, seen.orientation),))
    drawn = draw(annotated, frame.height, frame.width, legend)
    if drawn.problems:
        return Checked(task, problems=tuple(f"{task.mask}: {task.image}: {text}" for text in drawn.problems))
    mask_HW = drawn.mask_HW
    if legend.stored and exif:
        mask_HW = np.ascontiguousarray(upright(mask_HW, seen.orientation))
    counts = count_indices(mask_HW)
    reading = seen if exif else seen.as_stored()
    return Checked(task, reading, proof.used_bits, proof.like_mask, seen.orientation,
                   converted=_written(task, out, mask_HW), class_pixels=counts[:classes].tolist(),
                   ignored=int(counts[IGNORE]), digest=digest, mask_digest=_digest(mask_HW),
                   crowds=drawn.crowds,
                   doubtful=tuple(f"{task.mask}: {task.image}: {text}" for text in drawn.doubtful))


def _written(task: Task, out: str, mask_HW: np.ndarray) -> str:
    """Writes the re-encoded mask; returns its path relative to the index's folder."""
    converted = f"masks/{task.key}.png"
    target = os.path.join(out, converted)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with files.renamed(target, f"{target}.{os.getpid()}.tmp") as file:
        write_index_png(file, mask_HW)
    return converted


def _frame_problem(task: Task, stated: tuple[int, int], frame: Reading, other: Reading, turn: int) -> str:
    """Message for an image size that differs from the annotation file, with a hint if the other EXIF rule
    matches."""
    hint = ""
    if stated == (other.width, other.height):
        way = "upright" if frame == other.as_stored() and turn != 1 else "stored"
        hint = f"; they match with --data.annotated {way}, as the image's EXIF orientation is {turn}"
    return (f"{task.mask}: it says that {task.image} has {stated[0]}x{stated[1]} pixels, but it has "
            f"{frame.width}x{frame.height}{hint or '; the shapes were drawn at another size'}")


def _mask_problems(path: str, stored: Stored, counts: np.ndarray, classes: int) -> list[str]:
    """Problems of one mask alone."""
    problems = []
    if stored.transparent:
        problems.append(f"{path}: {stored.transparent} pixels of the mask are transparent and others are "
                        "not, so their class is ambiguous; flatten the image (without anti-aliasing) and "
                        "save it without an alpha channel")
    wrong = [i for i in counts.nonzero()[0].tolist() if classes <= i != IGNORE]
    if len(wrong) > MANY:
        problems.append(f"{path}: {len(wrong)} ids from {wrong[0]} to {wrong[-1]} in {counts[wrong].sum()} "
                        f"pixels are outside the class list (0 to {classes - 1}; 255 is ignore): soft edges "
                        "or JPEG noise; save the mask as PNG without anti-aliasing, or replace these ids "
                        "with the nearest class id in an image editor")
    elif wrong:
        ids = ", ".join(f"id {i} in {counts[i]} pixels" for i in wrong[:5]) + ", ..." * (len(wrong) > 5)
        problems.append(f"{path}: class {ids}; the class list has ids 0 to {classes - 1} (255 is ignore); "
                        "map other ids with --data.mask-map")
    return problems


def _digest(mask_HW: np.ndarray) -> bytes:
    return hashlib.sha256(repr(mask_HW.shape).encode() + mask_HW.tobytes()).digest()


def _look(path: str) -> tuple[Reading, DecodeFindings, bytes]:
    """Reading of an image (rotated upright), findings from decoding it completely, and its digest.

    Headers alone would accept truncated files.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        reading, proof = check_decodable(data)
    except BadImage as bad:
        raise UserError(f"{path}: cannot be read as an image ({bad}); replace or remove it") from None
    except DECODE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error
    plain = reading.plain and looks_whole(data)
    return reading._replace(plain=plain), proof, hashlib.sha256(data).digest()


def _size_problem(task: Task, reading: Reading, other: Reading, mask_size: tuple[int, int], mask_turn: int,
                  exif: bool) -> str:
    """Message for a mask size that differs from its image, with a hint if the other EXIF rule matches.

    Args:
        other: the reading under the other rule.
        mask_size: (width, height).
    """
    # The mask was rotated under exif=True only; for sizes, a 90-degree rotation is its own inverse.
    mask_other = upright_size(*mask_size, mask_turn)
    hint = ""
    if (other.width, other.height) == mask_other:
        turn = max(reading.orientation, other.orientation)
        switch = "--data.no-exif" if exif else "--data.exif"
        whose, turn = ("image", turn) if turn != 1 else ("mask", mask_turn)
        hint = f"; they match with {switch}, as the {whose}'s EXIF orientation is {turn}"
    return (
        f"{task.mask}: the mask has {mask_size[0]}x{mask_size[1]} pixels, "
        f"but its image {task.image} has {reading.width}x{reading.height}{hint or '; they must be equal'}"
    )


def _relative(error: UserError, root: str) -> str:
    """The message with paths relative to the root, as in list files."""
    return str(error).replace(root + os.sep, "", 1)
