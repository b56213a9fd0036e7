"""The survey of a data set: lists its files, checks each, and judges them together."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stpp import files, log
from stpp.dataset import class_files, drawn, layouts, legends, table, twins, unlabelled_folders
from stpp.dataset import mask_map as mapping
from stpp.dataset.card import Tally
from stpp.dataset.check import Checked, Task, check_all
from stpp.dataset.mask_judge import Judge
from stpp.dataset.notes import Notes
from stpp.dataset.notices import Notices, ShapeNotices
from stpp.dataset.stamps import listing, stamp
from stpp.errors import UserError

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """Results of checking all files."""

    counts: dict[str, int]
    """Number of images, masks and converted masks."""
    tally: Tally
    contents: str
    """Digest of the images' paths, bytes and class ids; equal for a copy of the data set elsewhere."""
    twins: list[list[str]]
    """Groups of images that are copies of each other."""


def tasks(root: Path, settings: dict, out: Path, notes: Notes) -> tuple[list[tuple[Path, list[Task]]], str]:
    """Tasks by the folder that their paths are relative to, and the fingerprint of files and settings."""
    follow = settings.get("follow_links", False)
    found_images = layouts.find(
        root,
        settings["layout"],
        settings["images"],
        settings["masks"],
        exclude=out,
        follow_links=follow,
        notes=notes,
    )
    further = unlabelled_folders.find(
        settings.get("unlabelled", ()), root, found_images, exclude=out, follow_links=follow, notes=notes
    )
    digest = hashlib.sha256(json.dumps([table.VERSION, str(root), settings], sort_keys=True).encode())
    for file in _files(root, settings):  # these also list images without shapes, whose rows omit the file
        digest.update(f"{stamp(root, file)[:3]}\n".encode())
    if settings["layout"] == "yolo":  # its texts hold numbers, which another file names
        digest.update(repr(class_files.from_tools(root)).encode())
    places = []
    for place, members in [(root, found_images), *further]:
        stamps = listing(place, members)
        places.append((place, [
            (found_image, next(stamps), None if found_image.mask is None else next(stamps))
            for found_image in members
        ]))
    places = twins.deduplicated(places, notes)
    tasks_by_folder = []
    for place, members in places:
        tasks_by_folder.append((place, []))
        for found_image, image, mask in members:
            for file in filter(None, (image, mask)):
                digest.update(f"{file.path}\n{file.bytes} {file.mtime_ns}\n".encode())
            tasks_by_folder[-1][1].append(
                Task(
                    found_image.key,
                    found_image.image,
                    found_image.mask,
                    image.bytes,
                    image.mtime_ns,
                    mask and mask.bytes,
                    mask and mask.mtime_ns,
                    found_image.shapes,
                    found_image.listed,
                )
            )
    return tasks_by_folder, digest.hexdigest()


def _files(root: Path, settings: dict) -> list[str]:
    return drawn.files_of(root, settings["layout"], settings["masks"],
                          follow_links=settings.get("follow_links", False))


def check_files(
    listed: Sequence[tuple[Path, list[Task]]],
    out: Path,
    settings: dict,
    notes: Notes,
    *,
    workers: int | None,
    progress: bool,
) -> Survey:
    """Checks all tasks and writes index.parquet.

    Raises:
        UserError: problems; all are listed in `out/problems.txt` and the first ones printed.
    """
    from tqdm import tqdm

    root, total = listed[0][0], sum(len(members) for _, members in listed)
    is_drawn = settings["layout"] in drawn.FORMATS
    mask_map = None if is_drawn else mapping.parse(settings["mask_map"], settings["classes"])
    meaning = legends.legend(root, settings, _files(root, settings)) if is_drawn else mask_map
    totals = _Totals(settings["classes"], Judge(settings["classes"], mask_map))
    arguments = (str(out), len(settings["classes"]), settings["exif"], meaning)
    checked = (
        chunk for place, members in listed for chunk in check_all(members, (str(place), *arguments), workers)
    )
    with files.atomic(out / "index.parquet") as file, table.IndexWriter(file) as writer:
        with tqdm(total=total, desc="prepare", unit="image", disable=not progress, dynamic_ncols=True) as bar:
            for chunk in checked:
                bar.update(len(chunk))
                for checked_image in chunk:
                    totals.add(checked_image)
                if not totals.problems:
                    writer.add(chunk)
        problems = totals.problems + totals.judge.problems()
        if problems:
            _refuse(problems, root, out)
    for text in totals.judge.warnings():
        notes.warn(text)
    totals.notices.say(notes)
    if is_drawn:
        totals.shapes.say(notes, meaning, exif=settings["exif"])
    return Survey(counts=totals.counts, tally=totals.tally, contents=totals.contents.hexdigest(),
                  twins=twins.groups(totals.copies.values(), notes))


@dataclass
class _Totals:
    """Totals over the files."""

    classes: Sequence[str]
    judge: Judge
    counts: dict[str, int] = field(default_factory=lambda: {"images": 0, "masks": 0, "converted": 0})
    problems: list[str] = field(default_factory=list)
    first: dict[bytes, str] = field(default_factory=dict)
    """First image of each digest."""
    copies: dict[str, list[str]] = field(default_factory=dict)
    """Images that are copies of each other, by the first of them."""

    def __post_init__(self):
        self.contents = hashlib.sha256(json.dumps(list(self.classes)).encode())
        self.tally, self.notices, self.shapes = Tally(self.classes), Notices(), ShapeNotices()

    def add(self, checked: Checked) -> None:
        self.problems.extend(checked.problems)
        self.counts["images"] += 1
        self.counts["masks"] += checked.class_pixels is not None
        self.counts["converted"] += checked.converted is not None
        self.tally.add(checked)
        if checked.reading is not None:
            self.notices.add(checked)
        if checked.task.shapes is not None:
            self.shapes.add(checked)
        elif checked.class_pixels is not None:
            self.judge.add(checked.task.mask, checked.stored, [*checked.class_pixels, checked.ignored],
                           checked.edges)
        self.contents.update(f"{checked.task.image}\n".encode() + checked.digest + checked.mask_digest)
        first = self.first.setdefault(checked.digest, checked.task.image)
        if checked.digest and first != checked.task.image:
            self.copies.setdefault(first, [first]).append(checked.task.image)


def _refuse(problems: list[str], root: Path, out: Path) -> None:
    files.write_text(out / "problems.txt", "".join(problem + "\n" for problem in problems))
    if len(problems) == 1:
        raise UserError(f"{root}: {problems[0]}")
    for problem in problems[:SHOWN_PROBLEMS]:
        log.say(problem)
    raise UserError(
        f"{root}: {len(problems)} problems, all listed in {out / 'problems.txt'}; the first: {problems[0]}"
    )
