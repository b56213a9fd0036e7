"""Results of stages as text."""

from stpp import log


def summary(results: dict) -> str:
    """Formats the final table of the stages' results."""
    rows = [("stage", "mIoU", "steps", "seconds")]
    for stage in results["stages"] + [results[key] for key in ("control",) if key in results]:
        miou = "" if stage["miou"] is None else f"{stage['miou']:.2f}"
        if stage.get("pseudo_label_miou") is not None:
            miou = f"(labels {stage['pseudo_label_miou']:.2f})"
        rows.append((stage["name"], miou, stage["steps"] or "", f"{stage['seconds']:.0f}"))
    return "\n" + log.table(rows)


def outcome(record: dict) -> str:
    """Formats the result of a stage in one line, from its DONE.json."""
    parts = []
    if record["miou"] is not None:
        parts.append(f"mIoU {record['miou']:.2f} at step {record['best_step']}")
        if record["best_step"] != record["steps"] and record.get("last_miou") is not None:
            parts.append(f"{record['last_miou']:.2f} at the end")
    if record.get("pseudo_label_miou") is not None:
        parts.append(f"mIoU {record['pseudo_label_miou']:.2f} against the masks of these images")
    if "mean_reliability" in record:
        parts.append(f"mean reliability {record['mean_reliability']:.3f}")
    return ", ".join([*parts, f"{record['seconds']:.0f} s"])
