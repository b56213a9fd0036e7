"""The index of a data set: every image and mask is checked once, so that training meets no broken file.

`prepare` decodes all files on all cores and writes to the index's own folder: `index.parquet` (one row per
image), `masks/` (masks re-encoded as 8-bit grayscale) and, last, `index.json` (classes, settings,
fingerprint). The index exists when `index.json` exists; until then `unfinished.json` records its settings.
Nothing is written to the user's data.

EXIF: one rule for images and masks, see stpp.images.image_file.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from stpp import files
from stpp.dataset import card, contact_sheet, layouts, official, survey, table, unlabelled_folders
from stpp.dataset import settings as setting
from stpp.dataset.entries import Entry, Index
from stpp.dataset.notes import Notes
from stpp.dataset.walk import INDEX_MARK
from stpp.errors import UserError

_USE = ".in-use"
"""File that running trainings lock."""
_UNFINISHED = "unfinished.json"
"""Root and settings of an unfinished preparation: interrupted or rejected."""


def prepare(
    root: str | os.PathLike,
    out: str | os.PathLike,
    *,
    workers: int | None = None,
    progress: bool = True,
    strict: bool = False,
    only_if_stale: bool = False,
    **options,
) -> Index:
    """Checks every image and mask of a data set and writes its index and data card (see stpp.dataset.card).

    Images are decoded completely (JPEG at an eighth of the size), because a damaged file found later would
    stop training.

    Args:
        root: the data root; nothing is written there.
        out: the index's folder.
        workers: number of processes; None: one per core.
        progress: show a progress bar on stderr.
        strict: treat warnings as errors.
        only_if_stale: keep an index that fits the files. Of processes that share the folder one prepares
            it, and the others wait.
        options: arguments of stpp.dataset.settings.resolved, all optional:
            layout, images, masks: see stpp.dataset.layouts.
            classes: names in id order; default: those of a file in the root (stpp.dataset.class_files), then
                VOC's and Cityscapes' in their layouts.
            mask_map: mapping of mask values that are not class ids, see stpp.dataset.mask_map.
            exif: see stpp.images.image_file.
            unlabelled: further folders of images, see stpp.dataset.unlabelled_folders.
            follow_links: follow links that lead out of the root.
            unlisted, annotated, crowds, doubtful: for layouts with drawn masks, see
                stpp.annotations.shapes.Legend.

    Raises:
        UserError: see stpp.dataset.layouts.find; or problems with files, all listed in `out/problems.txt` and
            the first ones printed: class ids outside the class list, differing sizes, unreadable files,
            ambiguous masks (stpp.dataset.mask_judge).
    """
    settings, classes = setting.resolved(root, **options)
    root, out, notes = layouts.checked_root(root), Path(out).expanduser().absolute(), Notes()
    setting.refuse_inside(root, out.resolve(), settings)
    table.read_json(out)
    tasks, digest = survey.tasks(root, settings, out, notes)
    with _claimed(out), contextlib.ExitStack() as stack:
        if only_if_stale and (known := _of_this_version(out)) and known["fingerprint"] == digest:
            return _opened(out, known)
        _unused(out, stack)
        stored = {
            "format": table.FORMAT,
            "version": table.VERSION,
            "root": str(root),
            "classes": settings["classes"],
            "layout": settings["layout"],
            "fingerprint": digest,
            "contents": "",
            "counts": dict.fromkeys(("images", "masks", "converted"), 0),
            "settings": settings,
            "twins": [],
            "warnings": [],
        }
        files.write_json(out / _UNFINISHED, stored)
        for name in ("index.json", "problems.txt", card.JSON, card.TEXT, card.SHEET):
            (out / name).unlink(missing_ok=True)
        surveyed = survey.check_files(tasks, out, settings, notes, workers=workers, progress=progress)
        stored |= {"counts": surveyed.counts, "twins": surveyed.twins, "contents": surveyed.contents}
        setting.say_classes(classes, surveyed.tally.pixels if surveyed.counts["masks"] else (), root, notes)
        prepared = _described(_opened(out, stored), surveyed.tally, notes)
        if strict:
            notes.refuse()
        if surveyed.counts["converted"]:
            os.sync()  # masks are plain writes: they must be on disk before index.json exists
        files.write_json(out / "index.json", stored | {"warnings": notes.warnings})
        (out / _UNFINISHED).unlink()
    return dataclasses.replace(prepared, warnings=tuple(notes.warnings))


def _described(index: Index, tally: card.Tally, notes: Notes) -> Index:
    """Reports the official splits, and writes the card and the contact sheet."""
    splits = official.say(index, notes)
    card.write(
        index.out,
        tally,
        about={"root": str(index.root), "layout": index.layout, "counts": index.counts},
        splits=splits,
        notes=notes,
    )
    shown = contact_sheet.spread(index.entries.having("mask") or list(index.entries))
    contact_sheet.write(index.out / card.SHEET, map(index.sample, shown), index.classes)
    return index


def load(out: str | os.PathLike) -> Index:
    """Reads an index written by `prepare`.

    Raises:
        UserError: no index, or an index that is damaged, foreign, of another version, or with paths outside
            the root.
    """
    out = Path(out).expanduser().absolute()
    stored = table.read_json(out)
    if stored is None:
        state = "its preparation is unfinished" if is_unfinished(out) else "holds no index (index.json)"
        raise UserError(f"{out}: {state}; run `stpp prepare`")
    if stored["version"] != table.VERSION:
        raise UserError(
            f"{out / 'index.json'}: index version {stored['version']}, not {table.VERSION}; run `stpp "
            "prepare` again"
        )
    return _opened(out, stored)


def _opened(out: Path, stored: dict) -> Index:
    """Index described by a validated index.json."""
    return Index(
        out=out,
        root=Path(stored["root"]),
        classes=tuple(stored["classes"]),
        layout=stored["layout"],
        exif=stored["settings"]["exif"],
        fingerprint=stored["fingerprint"],
        contents=stored["contents"],
        counts=stored["counts"],
        entries=table.read(
            out / "index.parquet", Entry, rows=stored["counts"]["images"], classes=len(stored["classes"])
        ),
        unlabelled=unlabelled_folders.places(stored["settings"].get("unlabelled", ())),
        settings=stored["settings"],
        twins={image: number for number, images in enumerate(stored["twins"]) for image in images},
        warnings=tuple(stored["warnings"]),
    )


def is_stale(out: str | os.PathLike, root: str | os.PathLike, **options) -> bool:
    """Compares files (path, size, time) and settings with the index in `out`; True if they differ or there is
    no index.

    Raises:
        UserError: as `prepare`, except for problems inside files; or `out` contains something else than an
            index.
    """
    out = Path(out).expanduser().absolute()
    settings, _ = setting.resolved(root, **options)
    stored = _of_this_version(out)
    if stored is None:
        return True
    return (
        survey.tasks(layouts.checked_root(root), settings, out, Notes(quiet=True))[1] != stored["fingerprint"]
    )


def differing_settings(out: str | os.PathLike, root: str | os.PathLike, **options) -> list[str]:
    """Names of the settings that differ from those of the complete index in `out`, among them the root if the
    index's still exists; none without an index.

    Raises:
        UserError: an invalid setting; or `out` contains something else than an index.
    """
    settings, _ = setting.resolved(root, **options)
    stored = _of_this_version(Path(out).expanduser().absolute())
    known = stored["settings"] if stored else settings
    if stored and Path(stored["root"]) != layouts.checked_root(root) and Path(stored["root"]).is_dir():
        settings, known = settings | {"root": str(root)}, known | {"root": stored["root"]}
    return sorted(name for name in settings.keys() | known.keys() if settings.get(name) != known.get(name))


def _of_this_version(out: Path) -> dict | None:
    stored = table.read_json(out)
    whole = stored and stored["version"] == table.VERSION and (out / "index.parquet").is_file()
    return stored if whole else None


def warned(index: Index) -> list[str]:
    """Warnings of the preparation, and those of the folders' current content: skipped files are in no
    fingerprint."""
    notes = Notes(quiet=True)
    survey.tasks(index.root, dict(index.settings), index.out, notes)
    return list(dict.fromkeys([*index.warnings, *notes.warnings]))


def is_unfinished(out: Path) -> bool:
    """True for a folder with an unfinished preparation."""
    return not (out / "index.json").exists() and (out / _UNFINISHED).exists()


def renewed(out: Path) -> Index:
    """Prepares the index again, with its stored settings and the current files.

    Raises:
        UserError: as `prepare`. The index is then unfinished: after fixing the files, run the same command
            again.
    """
    stored = table.read_json(out, _UNFINISHED if is_unfinished(out) else "index.json")
    return prepare(stored["root"], out, progress=False, **stored["settings"])


@contextlib.contextmanager
def in_use(out: Path) -> Iterator[None]:
    """Keeps processes from rewriting the index in `out`, if its folder can be written."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(files.locked(out / _USE, shared=True))
        yield


def _unused(out: Path, stack: contextlib.ExitStack) -> None:
    """Keeps runs from using the index in `out` while it is rewritten.

    Raises:
        UserError: a run uses it.
    """
    try:
        stack.enter_context(files.locked(out / _USE, wait=False))
    except BlockingIOError:
        raise UserError(f"{out}: a run is training on this index, which would be rewritten because the data "
                        "set or its settings differ; stop the run, or choose another folder") from None


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Creates the index's folder and holds its lock; rejects a foreign folder masks/, because masks are
    written there.

    Raises:
        UserError: the folder is another's, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark = out / INDEX_MARK
        if not mark.exists() and (out / "masks").exists():
            raise UserError(f"{out}: contains a folder masks/ that is not an index's; choose another folder")
        with files.locked(mark):
            yield
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: the index cannot be written ({error.strerror or error})"
        ) from error
