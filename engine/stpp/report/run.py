"""Results of a run besides its labels: stages, curves, and its labelled set."""

import json
from dataclasses import dataclass
from pathlib import Path

from stpp import files
from stpp.config import flatten
from stpp.dataset import card, index, splits
from stpp.errors import UserError
from stpp.report.charts import Curve, curve
from stpp.report.labelling import added, json_of

METRICS = {"miou_pct": "validation mIoU, %", "student_miou_pct": "validation mIoU of the student, %",
           "loss": "loss", "loss_labelled": "loss of labelled pixels",
           "loss_strong": "loss of the strong view", "loss_strong_1": "loss of the first strong view",
           "loss_strong_2": "loss of the second strong view", "loss_dropped": "loss of dropped features",
           "confident_share": "share of pixels that became labels", "lr": "learning rate",
           "images_per_s": "images/s", "data_wait_pct": "time waiting for data, %"}
"""Titles of the `metrics.jsonl` keys; other keys are shown as they are."""
SCORES = "scores.json"
"""File in a stage's folder with the `stpp evaluate --out` scores of its best checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run, finished or not."""

    name: str
    record: dict
    """Content of DONE.json; empty if the stage is unfinished."""
    curves: list[Curve]
    compared: dict[str, float]
    """mIoU in percent of other networks at the step of the best one, by name."""
    iou: dict[str, float | None]
    """IoU in percent by class on the validation list; empty if not recorded."""
    shares: "Shares | None"
    """Class shares as last recorded by the stage."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Class shares among the labelled pixels of a stage, and among the pixels that a network labelled."""

    step: int
    label_kind: str
    """Origin of the network's labels: "pseudo-labelled" or "confident"."""
    rows: list[tuple[str, float, float, float | None]]
    """(class, percent of the labelled pixels, percent of the network's, their ratio)."""


def stages(run: Path) -> list[Stage]:
    """Stages in order, with the control last."""
    run_stages = []
    for folder in sorted(path for path in (run / "stages").iterdir() if path.is_dir()):
        iou, record = json_of(folder / SCORES).get("iou"), json_of(folder / "DONE.json")
        rows = _rows(folder / "metrics.jsonl")
        run_stages.append(Stage(name=folder.name, record=record, curves=_curves(rows), shares=_shares(rows),
                           compared=_compared(rows, record.get("best_step")),
                           iou=iou if isinstance(iou, dict) else {}))
    return run_stages


def of_labels(labels: Path) -> Path | None:
    """Run that contains a folder of labels; None outside a run."""
    return next((folder for folder in labels.resolve().parents if (folder / "stages").is_dir() and
                 (folder / "config.json").is_file()), None)


def classes(run: Path) -> list[str]:
    """Class names by id; empty if not recorded."""
    return [str(name) for name in json_of(run / "provenance.json").get("classes", [])]


def labelled_pixels(run: Path) -> tuple[list[int], str | None]:
    """Pixels per class in the run's labelled set, and the reason if they are unknown."""
    data = json_of(run / "config.json").get("data", {})
    try:
        dataset_index = index.load(Path(data.get("index") or run / "index"))
        samples = splits.read_split(Path(data.get("split") or run / "split") / "labeled.txt", dataset_index,
                                    labelled=True)
    except UserError as error:
        return [], str(error)
    total: list[int] = []
    for counts in dataset_index.class_pixels(samples):
        total = added(total, counts)
    return total, None


def data_card(run: Path) -> tuple[str, Path | None]:
    """Text and contact sheet of the data card of a run's index; "" and None without them."""
    folder = Path(json_of(run / "config.json").get("data", {}).get("index") or run / "index")
    try:
        text = files.read_text(folder / card.TEXT)
    except (OSError, ValueError):
        return "", None
    return text, folder / card.SHEET if (folder / card.SHEET).is_file() else None


def provenance(run: Path) -> dict[str, dict[str, str]]:
    """Tables of the run's settings, versions and data, by title."""
    made_of = flatten(json_of(run / "provenance.json"))
    made_of.pop("classes", None)
    return {"Versions and data": _texts(made_of), "Settings": _texts(flatten(json_of(run / "config.json")))}


def made_by(labels_json: dict) -> dict[str, str]:
    """Content of a labelling's `run.json` as one table."""
    return _texts(flatten(labels_json))


def _texts(values: dict) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _rows(path: Path) -> list[dict]:
    """Readable rows of a stage's metrics."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    parsed = []
    for line in lines:
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError):  # a line truncated by a crash
            continue
        parsed.append(row)
    return parsed


def _shares(rows: list[dict]) -> Shares | None:
    """Class shares of the last row that has them."""
    for row in reversed(rows):
        for kind, label_kind in (("confident", "confident"), ("pseudo", "pseudo-labelled")):
            keys = ("labelled_pct", f"{kind}_pct", f"{kind}_ratio")
            labelled, network, ratios = (row.get(key) for key in keys)
            if all(isinstance(column, dict) for column in (labelled, network, ratios)):
                return Shares(step=row["step"], label_kind=label_kind,
                              rows=[(name, labelled[name], network[name], ratios[name]) for name in labelled])
    return None


def _curves(rows: list[dict]) -> list[Curve]:
    values: dict[str, list[tuple[int, float]]] = {key: [] for key in METRICS}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                values.setdefault(key, []).append((row["step"], value))
    return [chart for key, pairs in values.items() if (chart := curve(METRICS.get(key, key), pairs))]


def _compared(rows: list[dict], step: int | None) -> dict[str, float]:
    ending = "_miou_pct"
    return {key.removesuffix(ending): value for row in rows if row["step"] == step
            for key, value in row.items() if key.endswith(ending) and isinstance(value, (int, float))}
