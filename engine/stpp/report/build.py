"""Writes a report: one folder that any browser opens offline.

`index.html` (from `page.html`), `report.js`, `report.css`, `data/rows-<i>.js` (browsers load scripts from
disk, but not JSON), `pictures/`, and `report.json`, which marks the folder as a report. Image names are
untrusted: they reach the page through template escaping, or as data that the script sets as text, never as
markup, code or file names.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stpp import __version__, files
from stpp.errors import UserError
from stpp.report import calibration, charts, labelling, pictures, templates
from stpp.report import run as runs
from stpp.report.labelling import Labelling
from stpp.training.class_shares import ABSENT

FORMAT = "stpp-report-1"
CHUNK = 20_000
"""Rows per data file."""
DRIFT, DRIFT_LEAST = 2.0, 0.001
"""A class drifts if its share differs by the factor `DRIFT` from that in the labelled set, and either share
is at least `DRIFT_LEAST`."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Share of a class in the pixels of one labelling."""

    share: float
    factor: float | None
    """Ratio to its share in the labelled set; None if it does not drift, or if no reference is known."""


def write_report(folder: Path, out: Path, *, run: Path | None = None, reliability: Path | None = None,
                 most_pictures: int = 400) -> None:
    """Writes the report of a run, or of an output of `stpp label`, replacing an existing report.

    Args:
        folder: the run or the labels.
        out: folder of the report.
        run: for labels: the run of their teacher; None: the run that contains them, if any.
        reliability: for labels: `reliability.parquet` of `stpp select` on the same images.
        most_pictures: maximum number of images drawn; the others are listed without a picture.

    Raises:
        UserError: `folder` is neither, a table is damaged, or `out` is not a report or not writable.
    """
    if out.exists() and not (out / "report.json").is_file():
        raise UserError(f"--out {out} exists and is not a report; choose another folder")
    is_run = (folder / "stages").is_dir()
    if not is_run and not (folder / "labels").is_dir():
        raise UserError(f"{folder}: neither a run (stages/) nor labels (labels/); give the --out of `stpp "
                        "train` or `stpp label`")
    run = folder if is_run else run or runs.of_labels(folder)
    scores, threshold = _reliability(folder if is_run else runs.of_labels(folder), reliability)
    labellings = [labelling.read(path, name, scores) for name, path in _label_folders(folder, is_run)]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for name in ("data", "pictures"):
            (temporary / name).mkdir(parents=True)
        _write(temporary, folder, run if run and run.is_dir() else None, is_run, labellings, scores,
               threshold, most_pictures)
        files.replace_folder(temporary, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror or error}; choose a writable folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _label_folders(folder: Path, is_run: bool) -> list[tuple[str, Path]]:
    if not is_run:
        return [(folder.resolve().name, folder)]
    return [(stage.name, stage) for stage in sorted((folder / "stages").iterdir())
            if any(stage.glob("labels/part-*.parquet"))]


def _reliability(run: Path | None, explicit: Path | None) -> tuple[dict[str, float], float | None]:
    path = explicit or next(iter(sorted(run.glob("stages/*/reliability.parquet"))) if run else iter(()), None)
    return labelling.reliabilities(path) if path else ({}, None)


def _write(out: Path, folder: Path, run: Path | None, is_run: bool, labellings: Sequence[Labelling],
           scores: dict[str, float], threshold: float | None, most_pictures: int) -> None:
    num_classes = max((len(labels.totals.class_pixels) for labels in labellings), default=0)
    names = next((list(labels.made_by["classes"]) for labels in labellings if labels.made_by.get("classes")),
                 None) or (runs.classes(run) if run else [])
    if len(names) < num_classes:
        names = [str(i) for i in range(num_classes)]
    picture_numbers = _draw(out / "pictures", labellings, most_pictures, num_classes)
    chunks = _write_rows(out / "data", labellings, picture_numbers)
    truth, unknown = runs.labelled_pixels(run) if run else ([], "no run is known; give the teacher's run "
                                                                "with --run")
    bins = [0] * labelling.BINS
    for score in scores.values():
        bins[labelling.bin_of(score)] += 1
    stages = runs.stages(folder) if is_run else []
    card_text, sheet = runs.data_card(run) if run else ("", None)
    if sheet:
        shutil.copyfile(sheet, out / "pictures" / sheet.name)
    values = {
        "title": folder.resolve().name, "version": __version__, "is_run": is_run, "stages": stages,
        "absent": ABSENT, "calibrations": calibration.of_run(folder) if is_run else [],
        "iou": _iou_table(stages), "labellings": labellings, "drift": _drift(names, truth, labellings),
        "drift_unknown": unknown,
        "drift_factor": DRIFT, "classes": [{"name": name, "swatch": pictures.swatch(i, num_classes)}
                                           for i, name in enumerate(names[:num_classes])],
        "ignored_swatch": pictures.swatch(255, num_classes), "confidence_scale": pictures.confidence_scale(),
        "chunks": chunks, "drawn": sum(map(len, picture_numbers)),
        "reliability": charts.histogram("reliability", bins, threshold=threshold), "threshold": threshold,
        "confidence": [(labels.name, charts.histogram("mean confidence", labels.totals.confidences))
                       for labels in labellings],
        "provenance": (runs.provenance(run) if run else {})
        | {f"Labels {labels.name}": runs.made_by(labels.made_by) for labels in labellings},
        "facts": {"classes": names[:num_classes], "labellings": [labels.name for labels in labellings],
                  "threshold": threshold,
                  "id": str(folder.resolve())},
        "card": card_text, "sheet": f"pictures/{sheet.name}" if sheet else None,
        "chart": {"width": charts.WIDTH, "height": charts.HEIGHT},
    }
    files.write_text(out / "index.html", templates.template("page.html").render(values))
    for name in ("report.js", "report.css"):
        shutil.copyfile(templates.FOLDER / name, out / name)
    files.write_json(out / "report.json",
                     {"format": FORMAT, "stpp": __version__, "of": str(folder.resolve()), "classes": names,
                      "images": sum(labels.totals.images for labels in labellings),
                      "bad": sum(labels.totals.bad for labels in labellings)})


def _draw(folder: Path, labellings: Sequence[Labelling], limit: int,
          num_classes: int) -> list[dict[str, int]]:
    """Picture numbers by image key, for each labelling."""
    picture_numbers: list[dict[str, int]] = []
    for labels in labellings:
        chosen = labelling.samples(labels.listed, limit // len(labellings))
        picture_numbers.append(pictures.draw(labels, chosen, folder, first=sum(map(len, picture_numbers)),
                                             num_classes=num_classes))
    return picture_numbers


def _write_rows(folder: Path, labellings: Sequence[Labelling], drawn: Sequence[dict[str, int]]) -> int:
    """Writes the listed images as scripts; returns their number. `report.js` reads rows by position."""
    rows = []
    for number, labels in enumerate(labellings):
        for image in labels.listed:
            shares = [part for class_id, share in image.shares for part in (class_id, round(100 * share, 1))]
            rows.append([image.key, number, image.reliability and round(image.reliability, 4),
                         round(image.confidence, 4), round(image.ignored, 4), image.width, image.height,
                         drawn[number].get(image.key, -1), shares])
    chunks = range(0, len(rows), CHUNK)
    for number, start in enumerate(chunks):
        # ASCII JSON is valid JavaScript for any names.
        text = json.dumps(rows[start : start + CHUNK], separators=(",", ":"), allow_nan=False)
        files.write_text(folder / f"rows-{number}.js", f"report.add({text});\n")
    return len(chunks)


def _iou_table(stages: Sequence[runs.Stage]) -> dict[str, list[float | None]]:
    """IoU by class for each stage with scores."""
    scored = [stage for stage in stages if stage.iou]
    return {name: [stage.iou.get(name) for stage in scored]
            for name in dict.fromkeys(key for stage in scored for key in stage.iou)}


def _drift(names: Sequence[str], truth: Sequence[int],
           labellings: Sequence[Labelling]) -> list[tuple[str, float | None, list[Share]]]:
    """(class, share in the labelled set, share in each labelling); shares of the pixels that are not
    ignored."""
    of_truth = _shares(truth, len(names))
    of_labels = [_shares(labels.totals.class_pixels, len(names)) for labels in labellings]
    table = []
    for i, name in enumerate(names):
        labelled = of_truth[i] if truth else None
        table.append((name, labelled,
                      [Share(share=shares[i], factor=_factor(shares[i], labelled)) for shares in of_labels]))
    return table


def _shares(counts: Sequence[int], length: int) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total for count in counts] + [0.0] * (length - len(counts))


def _factor(share: float, labelled: float | None) -> float | None:
    if labelled is None or max(share, labelled) < DRIFT_LEAST:
        return None
    factor = share / labelled if labelled else float("inf")
    return None if 1 / DRIFT < factor < DRIFT else factor
