"""The index of a data set: every image and mask looked at once, so that training meets no surprise.

`prepare` decodes all files on all cores and writes, below a folder of the index's own,
`index.parquet` (one row an image), `masks/` (masks that had to be written anew as 8-bit grayscale) and, last,
`index.json` (classes, settings, fingerprint). The index exists when `index.json` exists. Nothing is written to the
user's data.

EXIF: one rule for images and masks, see stpp.images.image_file.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType

from stpp import files, log
from stpp.dataset import layouts, table, unlabelled_folders
from stpp.dataset import mask_map as mapping
from stpp.dataset.check import Task, check_all
from stpp.dataset.classes import class_list
from stpp.dataset.notices import Notices
from stpp.errors import UserError
from stpp.loading.sample import Sample

SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One image of an index; paths relative to the data root, or to what Index.place says."""

    key: str
    image: str
    mask: str | None
    """The user's mask."""
    converted: str | None
    """The mask written anew, relative to the index's folder; None where the user's own is plain."""
    width: int
    """Pixels, after the EXIF rule."""
    height: int
    orientation: int
    """This and the next five: see stpp.images.reading.Reading."""
    plain: bool
    format: str
    colours: str
    alpha: bool
    bits: int
    used_bits: int
    """Bits that the largest number of the image needs; see stpp.images.reading.used_bits."""
    class_pixels: list[int] | None
    """Pixels of each class in the mask; None without a mask."""
    bytes: int
    """Of the image file."""
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """A prepared data set."""

    out: Path
    """The index's folder."""
    root: Path
    classes: tuple[str, ...]
    layout: str
    exif: bool
    fingerprint: str
    """Changes when a file of the data set, or a setting, does."""
    counts: dict[str, int]
    """images, masks, converted."""
    entries: Mapping[str, Entry]
    """By the image's path relative to the root, sorted; behind them those of further folders."""
    unlabelled: Mapping[str, Path] = field(default_factory=dict)
    """Where images lie that are not below the root, by the first part of their paths."""

    def place(self, image: str) -> Path:
        """The folder that an image's path is relative to."""
        return self.unlabelled.get(image.partition("/")[0], self.root)

    def find(self, image: str) -> Entry | None:
        """The entry of an image, its accents written in any form; None if there is none."""
        return (
            self.entries.get(image)
            or self.entries.get(unicodedata.normalize("NFC", image))
            or self.entries.get(unicodedata.normalize("NFD", image))
        )

    def sample(self, image: str, *, strong: bool = False, mask: str | None | EllipsisType = ...) -> Sample:
        """What a loader reads for an image.

        Args:
            image: path relative to the root.
            strong: see Sample.
            mask: path of another mask (a pseudo label), or None for none; left out: the data set's own, if it has one.

        Raises:
            UserError: the index has no such image.
        """
        entry = self.find(image)
        if entry is None:
            raise UserError(f"{image}: not in the index of {self.root}; is it named relative to --data.root?")
        if mask is ...:
            mask = None
            if entry.mask is not None:
                mask = str(self.out / entry.converted if entry.converted else self.root / entry.mask)
        elif mask is not None:
            mask = os.path.abspath(mask)
        return Sample(
            key=entry.key,
            image=str(self.place(entry.image) / entry.image),
            mask=mask,
            width=entry.width,
            height=entry.height,
            orientation=entry.orientation,
            plain=entry.plain,
            strong=strong,
        )


def prepare(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    classes: Sequence[str] = (),
    mask_map: Sequence[str] = (),
    exif: bool = True,
    unlabelled: Sequence[str | os.PathLike] = (),
    workers: int | None = None,
    progress: bool = True,
) -> Index:
    """Reads every image and mask of a data set and writes its index.

    Images are decoded to the end (JPEG at an eighth of the size), because a damaged file found later would stop
    training.

    Args:
        root: the data root; nothing is written there.
        out: the index's folder.
        layout, images, masks: see stpp.dataset.layouts.
        classes: names in the order of their ids; else those of `classes.json` in the root; else VOC's and Cityscapes' in
            their layouts.
        mask_map: what masks hold that is not class ids, see stpp.dataset.mask_map.
        exif: see stpp.images.image_file.
        unlabelled: further folders of images, see stpp.dataset.unlabelled_folders.
        workers: processes; None: one a core.
        progress: show a bar on stderr.

    Raises:
        UserError: see stpp.dataset.layouts.find; or files have problems, all of which are listed in `out/problems.txt` and
            the first ones printed: class ids outside the class list, sizes that differ, unreadable files.
    """
    settings = _settings(root, layout, images, masks, classes, mask_map, exif, unlabelled)
    root, out = layouts.checked_root(root), Path(out).expanduser().absolute()
    _refuse_inside(root, out.resolve(), settings)
    table.read_json(out)
    tasks, digest = _tasks(root, settings, out)
    try:
        _claim(out)
        for name in ("index.json", "problems.txt"):
            (out / name).unlink(missing_ok=True)
        counts = _run(tasks, out, settings, workers, progress)
        files.write_json(
            out / "index.json",
            {
                "format": table.FORMAT,
                "version": table.VERSION,
                "root": str(root),
                "classes": settings["classes"],
                "layout": settings["layout"],
                "fingerprint": digest,
                "counts": counts,
                "settings": settings,
            },
        )
    except OSError as error:
        raise UserError(f"{error.filename or out}: the index cannot be written ({error.strerror or error})") from error
    return load(out)


def load(out: str | os.PathLike) -> Index:
    """Reads an index that `prepare` wrote.

    Raises:
        UserError: there is none, or its files are damaged, foreign, of another version, or name paths outside the root.
    """
    out = Path(out).expanduser().absolute()
    stored = table.read_json(out)
    if stored is None:
        raise UserError(f"{out}: holds no index (index.json); run `stpp prepare` first")
    if stored["version"] != table.VERSION:
        raise UserError(
            f"{out / 'index.json'}: index version {stored['version']}, not {table.VERSION}; run `stpp prepare` again"
        )
    entries = table.read(out / "index.parquet", Entry, rows=stored["counts"]["images"], classes=len(stored["classes"]))
    return Index(
        out=out,
        root=Path(stored["root"]),
        classes=tuple(stored["classes"]),
        layout=stored["layout"],
        exif=stored["settings"]["exif"],
        fingerprint=stored["fingerprint"],
        counts=stored["counts"],
        entries=entries,
        unlabelled=unlabelled_folders.places(stored["settings"].get("unlabelled", ())),
    )


def is_stale(
    out: str | os.PathLike,
    root: str | os.PathLike,
    *,
    layout: str = "auto",
    images: str | None = None,
    masks: str | None = None,
    classes: Sequence[str] = (),
    mask_map: Sequence[str] = (),
    exif: bool = True,
    unlabelled: Sequence[str | os.PathLike] = (),
) -> bool:
    """Whether `prepare` with these settings would find other files (path, size, time) or settings than the index in
    `out`.

    True if there is no index.

    Raises:
        UserError: as `prepare` before it looks into files; or `out` holds something that is no index.
    """
    out = Path(out).expanduser().absolute()
    settings = _settings(root, layout, images, masks, classes, mask_map, exif, unlabelled)
    stored = table.read_json(out)
    if stored is None or stored["version"] != table.VERSION or not (out / "index.parquet").is_file():
        return True
    return _tasks(layouts.checked_root(root), settings, out)[1] != stored["fingerprint"]


def _settings(root, layout, images, masks, classes, mask_map, exif, unlabelled) -> dict:
    """What an index depends on besides the files, JSON-able, with what the layout stands for resolved."""
    if not isinstance(exif, bool):
        raise TypeError(f"exif: expected a bool, got {exif!r}")
    layout = layouts.resolve(root, layout, images, masks)
    masks = masks or layouts.own_masks(root, layout)
    mask_map = list(mask_map or layouts.own_mask_map(layout, masks))
    classes = class_list(root, layout, classes)
    mapping.parse(mask_map, classes)
    settings = {"layout": layout, "images": images, "masks": masks, "classes": classes, "mask_map": mask_map, "exif": exif}
    # Left out where there are none: the fingerprint is then the one that the root alone has.
    return settings | ({"unlabelled": unlabelled_folders.checked(unlabelled)} if unlabelled else {})


def _refuse_inside(root: Path, out: Path, settings: dict) -> None:
    """The index may lie below the root, but not in the root itself or in a folder of images or masks."""
    taken = [root / prefix for prefix in layouts.folders(settings["layout"], settings["images"], settings["masks"])]
    taken += [Path(folder).resolve() for folder in settings.get("unlabelled", ())]
    if out == root or any(out == folder or (folder != root and folder in out.parents) for folder in taken):
        raise UserError(f"{out}: the index may not lie among the user's images or masks; choose another folder")


def _claim(out: Path) -> None:
    """Makes the folder; refuses one whose masks/ somebody else made, because masks are written there."""
    out.mkdir(parents=True, exist_ok=True)
    mark = out / ".stpp-index"
    if not mark.exists() and (out / "masks").exists():
        raise UserError(f"{out}: holds a folder masks/ that is not an index's; choose another folder")
    mark.touch()


def _tasks(root: Path, settings: dict, out: Path) -> tuple[list[tuple[Path, list[Task]]], str]:
    """What is to be looked at, with the folder that its paths are relative to, and the fingerprint of files and settings."""
    found = layouts.find(root, settings["layout"], settings["images"], settings["masks"], exclude=out)
    further = unlabelled_folders.find(settings.get("unlabelled", ()), root, found, exclude=out)
    digest = hashlib.sha256(json.dumps([table.VERSION, str(root), settings], sort_keys=True).encode())
    tasks = []
    for place, members in [(root, found), *further]:
        listing = layouts.listing(place, members)
        tasks.append((place, []))
        for one in members:
            path, size, mtime_ns = next(listing)
            digest.update(f"{path}\n{size} {mtime_ns}\n".encode())
            tasks[-1][1].append(Task(one.key, one.image, one.mask, size, mtime_ns))
            if one.mask is not None:
                path, size, mtime_ns = next(listing)
                digest.update(f"{path}\n{size} {mtime_ns}\n".encode())
    return tasks, digest.hexdigest()


def _run(tasks: list[tuple[Path, list[Task]]], out: Path, settings: dict, workers: int | None, progress: bool) -> dict[str, int]:
    """Checks all tasks and writes index.parquet; refuses if there are problems."""
    from tqdm import tqdm

    problems: list[str] = []
    counts = {"images": 0, "masks": 0, "converted": 0}
    pixels = [0] * len(settings["classes"])
    mask_map = mapping.parse(settings["mask_map"], settings["classes"])
    arguments, notices = (str(out), len(pixels), settings["exif"], mask_map), Notices()
    checked = (chunk for place, members in tasks for chunk in check_all(members, (str(place), *arguments), workers))
    root, total = tasks[0][0], sum(len(members) for _, members in tasks)
    with files.atomic(out / "index.parquet") as file, table.Writer(file) as writer:
        with tqdm(total=total, desc="prepare", unit="image", disable=not progress, dynamic_ncols=True) as bar:
            for chunk in checked:
                bar.update(len(chunk))
                for one in chunk:
                    problems.extend(one.problems)
                    counts["images"] += 1
                    counts["masks"] += one.class_pixels is not None
                    counts["converted"] += one.converted is not None
                    if one.class_pixels is not None:
                        pixels = [a + b for a, b in zip(pixels, one.class_pixels, strict=True)]
                    if one.reading is not None:
                        notices.add(one)
                if not problems:
                    writer.add(chunk)
        if problems:
            _refuse(problems, root, out)
    if counts["converted"]:
        # Masks are plain writes: they must be on the disk before index.json says so.
        os.sync()
    for line in notices.lines():
        log.say(line)
    empty = [name for name, count in zip(settings["classes"], pixels, strict=True) if not count]
    if empty and counts["masks"]:
        log.say(f"warning: no mask of {root} holds a pixel of: {', '.join(empty)}")
    return counts


def _refuse(problems: list[str], root: Path, out: Path) -> None:
    files.write_text(out / "problems.txt", "".join(problem + "\n" for problem in problems))
    if len(problems) == 1:
        raise UserError(f"{root}: {problems[0]}")
    for problem in problems[:SHOWN_PROBLEMS]:
        log.say(problem)
    raise UserError(f"{root}: {len(problems)} problems, all listed in {out / 'problems.txt'}; the first: {problems[0]}")
