"""The work of the preparation: to look at one image and its mask, and at all of them on all cores.

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
from stpp.images.reading import Proof, Reading, prove

_CHUNK = 32
"""Images passed to a process at once: enough to make passing them cheap, few enough that no core idles at the
end."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be looked at."""

    key: str
    image: str
    mask: str | None
    bytes: int
    """Of the image; -1 where it is no readable file. So in the other stamps."""
    mtime_ns: int
    mask_bytes: int | None = None
    mask_mtime_ns: int | None = None
    digest: bool = False
    """Take a digest of the image's bytes: another file is as long."""
    shapes: ShapeSource | None = None
    """Where in the file `mask` the shapes stand that the mask is drawn from; None: it is a mask."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found: an entry of the index, or problems."""

    task: Task
    reading: Reading | None = None
    """None where there are problems."""
    used_bits: int = 0
    """Bits that the image uses; see `stpp.images.reading.prove`."""
    like_mask: bool = False
    """True if the image looks like a mask; see there."""
    orientation: int = 1
    """EXIF orientation of the image file, 1 to 8, whether it is turned by it or not."""
    converted: str | None = None
    """The mask written anew, relative to the index's folder."""
    class_pixels: list[int] | None = None
    problems: tuple[str, ...] = ()
    ignored: int = 0
    """Pixels of the mask that are 255."""
    stored: Stored | None = None
    """How the mask stores its ids; None where it was drawn."""
    doubtful: tuple[str, ...] = ()
    """Shapes whose pixels became 255, in words."""
    crowds: int = 0
    """Shapes that are crowds."""
    edges: Edges | None = None
    digest: str | None = None
    """Of the image's bytes, where the task asks for it."""


def check_all(tasks: list[Task], arguments: tuple, workers: int | None = None) -> Iterator[list[Checked]]:
    """Checks tasks on all cores and yields the results in chunks, in order.

    Args:
        tasks: what to look at.
        arguments: what `check` takes besides the task.
        workers: processes; None: one a core. Few tasks are done in this process: starting others would take
            longer.
    """
    chunks = (tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK))
    workers = min(workers or processes.cores(), max(1, len(tasks) // (4 * _CHUNK)))
    died = ("a process that reads images died; if it was killed for lack of memory, fewer --data.threads "
            "need less")
    yield from processes.in_order(check_many, chunks, arguments, workers, died=died)


def check_many(tasks: list[Task], *arguments) -> list[Checked]:
    """`check` for each task, in order."""
    return [check(task, *arguments) for task in tasks]


def check(task: Task, root: str, out: str, classes: int, exif: bool,
          meaning: MaskMap | Legend | None = None) -> Checked:
    """Decodes an image and its mask, compares them, and writes the mask anew below `out` where it is not
    plain.

    Args:
        task: paths relative to the root.
        root: the data root.
        out: the index's folder.
        classes: number of classes; a mask may hold 0 .. classes - 1 and 255.
        exif: the EXIF rule, see stpp.images.image_file.
        meaning: what the numbers or colours of masks mean, or the labels of shapes; None: they are class ids.
    """
    if task.shapes is not None:
        return _check_drawn(task, root, out, classes, exif, meaning)
    seen, proof, digest, mask, problems = None, None, None, None, []
    try:
        seen, proof, digest = _look(os.path.join(root, task.image), task.digest)
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
        "stored": mask.stored, "edges": edges(mask.values)}
    return Checked(task, reading, proof.used_bits, proof.like_mask, seen.orientation, digest=digest,
                   **of_mask)


def _check_drawn(task: Task, root: str, out: str, classes: int, exif: bool, legend: Legend) -> Checked:
    """`check` of an image whose mask is drawn from shapes."""
    try:
        seen, proof, digest = _look(os.path.join(root, task.image), task.digest)
        frame = seen.as_stored() if legend.stored else seen
        found = readers.read(task.shapes, os.path.join(root, task.mask), frame.width, frame.height)
    except UserError as error:
        return Checked(task, problems=(_relative(error, root),))
    if found.size is not None and found.size != (frame.width, frame.height):
        other = seen if legend.stored else seen.as_stored()
        return Checked(task, problems=(_frame_problem(task, found.size, frame, other, seen.orientation),))
    drawn = draw(found, frame.height, frame.width, legend)
    if drawn.problems:
        return Checked(task, problems=tuple(f"{task.mask}: {task.image}: {text}" for text in drawn.problems))
    mask_HW = drawn.mask_HW
    if legend.stored and exif:
        mask_HW = np.ascontiguousarray(upright(mask_HW, seen.orientation))
    counts = count_indices(mask_HW)
    reading = seen if exif else seen.as_stored()
    return Checked(task, reading, proof.used_bits, proof.like_mask, seen.orientation,
                   converted=_written(task, out, mask_HW), class_pixels=counts[:classes].tolist(),
                   ignored=int(counts[IGNORE]), digest=digest, crowds=drawn.crowds,
                   doubtful=tuple(f"{task.mask}: {task.image}: {text}" for text in drawn.doubtful))


def _written(task: Task, out: str, mask_HW: np.ndarray) -> str:
    """Writes the mask anew; its path relative to the index's folder."""
    converted = f"masks/{task.key}.png"
    target = os.path.join(out, converted)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with files.renamed(target, f"{target}.{os.getpid()}.tmp") as file:
        write_index_png(file, mask_HW)
    return converted


def _frame_problem(task: Task, said: tuple[int, int], frame: Reading, other: Reading, turn: int) -> str:
    """Says that an image has another size than the file with its shapes says, and whether it would not the
    other way round."""
    hint = ""
    if said == (other.width, other.height):
        way = "upright" if frame == other.as_stored() and turn != 1 else "stored"
        hint = f"; they match with --data.annotated {way}, as the image's EXIF orientation is {turn}"
    return (f"{task.mask}: it says that {task.image} has {said[0]}x{said[1]} pixels, but it has "
            f"{frame.width}x{frame.height}{hint or '; the shapes were drawn at another size'}")


def _mask_problems(path: str, stored: Stored, counts: np.ndarray, classes: int) -> list[str]:
    """What is wrong with one mask alone."""
    found = []
    if stored.transparent:
        found.append(f"{path}: {stored.transparent} pixels of the mask are transparent and others are not, "
                     "so what they hold is not plain; flatten the image (without anti-aliasing) and save it "
                     "without an alpha channel")
    wrong = [i for i in counts.nonzero()[0].tolist() if classes <= i != IGNORE]
    if len(wrong) > MANY:
        found.append(f"{path}: {len(wrong)} ids from {wrong[0]} to {wrong[-1]} in {counts[wrong].sum()} "
                     f"pixels are outside the class list (0 to {classes - 1}; 255 is ignore): soft edges or "
                     "JPEG noise; save the mask as PNG without anti-aliasing, or give every pixel the "
                     "nearest id in an image editor")
    elif wrong:
        ids = ", ".join(f"id {i} in {counts[i]} pixels" for i in wrong[:5]) + ", ..." * (len(wrong) > 5)
        found.append(f"{path}: class {ids}; the class list has ids 0 to {classes - 1} (255 is ignore); "
                     "--data.mask-map turns other ids into these")
    return found


def _look(path: str, digested: bool) -> tuple[Reading, Proof, str | None]:
    """How an image is read, turned upright, what its data, decoded to the end, tell besides, and their
    digest.

    Headers alone would pass files that are cut short.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        found, proof = prove(data)
    except BadImage as bad:
        raise UserError(f"{path}: cannot be read as an image ({bad}); replace or remove it") from None
    except DECODE_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it") from error
    digest = hashlib.sha256(data).hexdigest() if digested else None
    return found._replace(plain=found.plain and looks_whole(data)), proof, digest


def _size_problem(task: Task, reading: Reading, other: Reading, mask_size: tuple[int, int], mask_turn: int,
                  exif: bool) -> str:
    """Says that the sizes differ, and whether they would not under the other EXIF rule.

    Args:
        other: the reading under the other rule.
        mask_size: (width, height).
    """
    # The mask has been turned under exif=True only; a turn by 90 degrees is its own inverse as far as the
    # size goes.
    mask_other = upright_size(*mask_size, mask_turn)
    hint = ""
    if (other.width, other.height) == mask_other:
        turn = max(reading.orientation, other.orientation)
        switch = "off (--data.no-exif)" if exif else "on"
        whose, turn = ("image", turn) if turn != 1 else ("mask", mask_turn)
        hint = f"; they match with --data.exif {switch}, as the {whose}'s EXIF orientation is {turn}"
    return (
        f"{task.mask}: the mask has {mask_size[0]}x{mask_size[1]} pixels, "
        f"but its image {task.image} has {reading.width}x{reading.height}{hint or '; they must be equal'}"
    )


def _relative(error: UserError, root: str) -> str:
    """The message with paths as the user wrote them in lists."""
    return str(error).replace(root + os.sep, "", 1)
