"""The survey of a data set: its files listed, each looked at once, and all of them judged together."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stpp import files, log
from stpp.dataset import drawn, layouts, legends, table, twins, unlabelled_folders
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
    """What was found."""

    counts: dict[str, int]
    """images, masks, converted."""
    tally: Tally
    twins: list[list[str]]
    """Images that are copies of each other."""


def tasks(root: Path, settings: dict, out: Path, notes: Notes) -> tuple[list[tuple[Path, list[Task]]], str]:
    """What is to be looked at, with the folder that its paths are relative to, and the fingerprint of files
    and settings."""
    follow = settings.get("follow_links", False)
    found = layouts.find(
        root,
        settings["layout"],
        settings["images"],
        settings["masks"],
        exclude=out,
        follow_links=follow,
        notes=notes,
    )
    further = unlabelled_folders.find(
        settings.get("unlabelled", ()), root, found, exclude=out, follow_links=follow, notes=notes
    )
    digest = hashlib.sha256(json.dumps([table.VERSION, str(root), settings], sort_keys=True).encode())
    for file in _files(root, settings):  # it may list images without a shape, whose rows do not name it
        digest.update(f"{stamp(root, file)[:3]}\n".encode())
    places = []
    for place, members in [(root, found), *further]:
        stamps = listing(place, members)
        places.append(
            (place, [(one, next(stamps), None if one.mask is None else next(stamps)) for one in members])
        )
    places = twins.once(places, notes)
    alike = twins.to_compare([image.bytes for _, members in places for _, image, _ in members])
    made = []
    for place, members in places:
        made.append((place, []))
        for one, image, mask in members:
            for file in filter(None, (image, mask)):
                digest.update(f"{file.path}\n{file.bytes} {file.mtime_ns}\n".encode())
            made[-1][1].append(
                Task(
                    one.key,
                    one.image,
                    one.mask,
                    image.bytes,
                    image.mtime_ns,
                    mask and mask.bytes,
                    mask and mask.mtime_ns,
                    image.bytes in alike,
                    one.shapes,
                )
            )
    return made, digest.hexdigest()


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
        UserError: there are problems, all of which are listed in `out/problems.txt` and the first ones
            printed.
    """
    from tqdm import tqdm

    root, total = listed[0][0], sum(len(members) for _, members in listed)
    is_drawn = settings["layout"] in drawn.FORMATS
    mask_map = None if is_drawn else mapping.parse(settings["mask_map"], settings["classes"])
    meaning = legends.legend(root, settings, _files(root, settings)) if is_drawn else mask_map
    seen = _Seen(settings["classes"], Judge(settings["classes"], mask_map))
    arguments = (str(out), len(settings["classes"]), settings["exif"], meaning)
    checked = (
        chunk for place, members in listed for chunk in check_all(members, (str(place), *arguments), workers)
    )
    with files.atomic(out / "index.parquet") as file, table.IndexWriter(file) as writer:
        with tqdm(total=total, desc="prepare", unit="image", disable=not progress, dynamic_ncols=True) as bar:
            for chunk in checked:
                bar.update(len(chunk))
                for one in chunk:
                    seen.add(one)
                if not seen.problems:
                    writer.add(chunk)
        problems = seen.problems + seen.judge.problems()
        if problems:
            _refuse(problems, root, out)
    for text in seen.judge.warnings():
        notes.warn(text)
    seen.notices.say(notes)
    if is_drawn:
        seen.shapes.say(notes, meaning, exif=settings["exif"])
    return Survey(counts=seen.counts, tally=seen.tally, twins=twins.groups(seen.digests, notes))


@dataclass
class _Seen:
    """Sums over the files."""

    classes: Sequence[str]
    judge: Judge
    counts: dict[str, int] = field(default_factory=lambda: {"images": 0, "masks": 0, "converted": 0})
    problems: list[str] = field(default_factory=list)
    digests: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self):
        self.tally, self.notices, self.shapes = Tally(self.classes), Notices(), ShapeNotices()

    def add(self, one: Checked) -> None:
        self.problems.extend(one.problems)
        self.counts["images"] += 1
        self.counts["masks"] += one.class_pixels is not None
        self.counts["converted"] += one.converted is not None
        self.tally.add(one)
        if one.reading is not None:
            self.notices.add(one)
        if one.task.shapes is not None:
            self.shapes.add(one)
        elif one.class_pixels is not None:
            self.judge.add(one.task.mask, one.stored, [*one.class_pixels, one.ignored], one.edges)
        if one.digest is not None:
            self.digests.setdefault(one.digest, []).append(one.task.image)


def _refuse(problems: list[str], root: Path, out: Path) -> None:
    files.write_text(out / "problems.txt", "".join(problem + "\n" for problem in problems))
    if len(problems) == 1:
        raise UserError(f"{root}: {problems[0]}")
    for problem in problems[:SHOWN_PROBLEMS]:
        log.say(problem)
    raise UserError(
        f"{root}: {len(problems)} problems, all listed in {out / 'problems.txt'}; the first: {problems[0]}"
    )
