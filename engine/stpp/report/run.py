"""What a run left on the disk besides its labels: stages, their curves, and the set it learned from."""

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
"""Keys of `metrics.jsonl` by what they are called in the report; others are shown by their own name."""
SCORES = "scores.json"
"""In a stage's folder: what `stpp evaluate --out` writes, of its best checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a run, done or not."""

    name: str
    record: dict
    """Content of DONE.json; empty where the stage is not done."""
    curves: list[Curve]
    compared: dict[str, float]
    """mIoU in percent that other networks had at the step of the best one, by their names."""
    iou: dict[str, float | None]
    """Percent by class on the validation list; empty where it is not recorded."""
    shares: "Shares | None"
    """Of the classes, as the stage last recorded them."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Classes among the labelled pixels of a stage, and among those that a network labelled."""

    step: int
    found: str
    """The latter: "pseudo" or "confident"."""
    rows: list[tuple[str, float, float, float | None]]
    """(class, percent of the labelled pixels, percent of the others, their ratio)."""


def stages(run: Path) -> list[Stage]:
    """The stages in their order, with the control at the end."""
    found = []
    for folder in sorted(path for path in (run / "stages").iterdir() if path.is_dir()):
        iou, record = json_of(folder / SCORES).get("iou"), json_of(folder / "DONE.json")
        rows = _rows(folder / "metrics.jsonl")
        found.append(Stage(name=folder.name, record=record, curves=_curves(rows), shares=_shares(rows),
                           compared=_compared(rows, record.get("best_step")),
                           iou=iou if isinstance(iou, dict) else {}))
    return found


def of_labels(labels: Path) -> Path | None:
    """The run that a folder of labels lies in; None where it lies in none."""
    return next((folder for folder in labels.resolve().parents if (folder / "stages").is_dir() and
                 (folder / "config.json").is_file()), None)


def classes(run: Path) -> list[str]:
    """Names by class id; empty where they are not recorded."""
    return [str(name) for name in json_of(run / "provenance.json").get("classes", [])]


def labelled_pixels(run: Path) -> tuple[list[int], str | None]:
    """Pixels of each class in the masks that the run learned from, and why they are not known."""
    data = json_of(run / "config.json").get("data", {})
    try:
        known = index.load(Path(data.get("index") or run / "index"))
        samples = splits.read_split(Path(data.get("split") or run / "split") / "labeled.txt", known,
                                    labelled=True)
    except UserError as error:
        return [], str(error)
    total: list[int] = []
    for counts in known.class_pixels(samples):
        total = added(total, counts)
    return total, None


def data_card(run: Path) -> tuple[str, Path | None]:
    """Text and contact sheet of the data card of a run's index; "" and None where there are none."""
    folder = Path(json_of(run / "config.json").get("data", {}).get("index") or run / "index")
    try:
        text = files.read_text(folder / card.TEXT)
    except (OSError, ValueError):
        return "", None
    return text, folder / card.SHEET if (folder / card.SHEET).is_file() else None


def provenance(run: Path) -> dict[str, dict[str, str]]:
    """Tables of what the run was made of, by title."""
    made_of = flatten(json_of(run / "provenance.json"))
    made_of.pop("classes", None)
    return {"Versions and data": _texts(made_of), "Settings": _texts(flatten(json_of(run / "config.json")))}


def made_by(labels_json: dict) -> dict[str, str]:
    """The content of a labelling's `run.json` as one table."""
    return _texts(flatten(labels_json))


def _texts(values: dict) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _rows(path: Path) -> list[dict]:
    """Rows of a stage's metrics that can be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError, AttributeError):  # a line cut short by a crash
            continue
        found.append(row)
    return found


def _shares(rows: list[dict]) -> Shares | None:
    """The last row by class."""
    for row in reversed(rows):
        for found in ("confident", "pseudo"):
            keys = ("labelled_pct", f"{found}_pct", f"{found}_ratio")
            ours, theirs, ratios = (row.get(key) for key in keys)
            if all(isinstance(one, dict) for one in (ours, theirs, ratios)):
                return Shares(step=row["step"], found=found,
                              rows=[(name, ours[name], theirs[name], ratios[name]) for name in ours])
    return None


def _curves(rows: list[dict]) -> list[Curve]:
    values: dict[str, list[tuple[int, float]]] = {key: [] for key in METRICS}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                values.setdefault(key, []).append((row["step"], value))
    return [drawn for key, pairs in values.items() if (drawn := curve(METRICS.get(key, key), pairs))]


def _compared(rows: list[dict], step: int | None) -> dict[str, float]:
    ending = "_miou_pct"
    return {key.removesuffix(ending): value for row in rows if row["step"] == step
            for key, value in row.items() if key.endswith(ending) and isinstance(value, (int, float))}
