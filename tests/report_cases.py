"""Cases of the tests of the report: labels of a few images with hostile names, and a run around them."""

import json
from pathlib import Path

import label_cases as cases
from stpp.label import rows

HOSTILE = ["<img src=x onerror=hacked=1>.jpg", "x</script><script>hacked=1<.jpg",
           "\"quoted' & spaced\u202e.jpg", "{{ 7 * 7 }}.jpg",
           "`${hacked=1}`.jpg", "ünï\u0301 – 火.jpg"]
"""Names of images; the second is a folder and a file in it."""
GOOD = 6


def images() -> dict[str, bytes]:
    """Images with hostile and plain names, and one that cannot be read."""
    hostile = {name: cases.encoded(cases.picture(40 + i)) for i, name in enumerate(HOSTILE)}
    return cases.good_files(GOOD) | hostile | {"<b>bad</b>.jpg": b"no image"}


def labels(folder: Path, output: str = "png", **config) -> Path:
    """Writes an output of `stpp label` of `images`, in which a pixel of low confidence is ignored."""
    cases.run(cases.as_folder(folder / "in", images()), folder / "labels", output=output, min_confidence=0.7,
              **config)
    return folder / "labels"


def key_of(name: str) -> str:
    return name.removesuffix(".jpg")


def run(folder: Path) -> Path:
    """Writes a run with the labels as its third stage; its data set is gone."""
    out, stages = folder / "run", folder / "run" / "stages"
    for name in ("1-supervised", "2-select", "4-retrain"):
        (stages / name).mkdir(parents=True)
    labels(folder).rename(stages / "3-label")
    keys = sorted(row["key"] for row in rows.read_parts(stages / "3-label", "labels")
                  if row["status"] == "ok")
    scores = [{"key": key, "reliability": i / len(keys), "reliable": i >= len(keys) // 2} for i,
              key in enumerate(keys)]
    rows.write(stages / "2-select" / "reliability.parquet", scores, rows.RELIABILITY)
    steps = [{"step": step, "loss": 1 / step, "lr": 0.1, "images_per_s": 9.0} for step in range(1, 1001)]
    lines = [json.dumps(row)
             for row in [*steps, {"step": 1000, "miou_pct": 61.5}, {"step": 1000, "loss": float("nan")}]]
    # truncated by a crash
    (stages / "1-supervised" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    done = {"name": "1-supervised", "miou": 61.5, "best_step": 1000, "steps": 1000, "seconds": 12.5,
            "validate_steps": 100}
    (stages / "1-supervised" / "DONE.json").write_text(json.dumps(done))
    (stages / "1-supervised" / "scores.json").write_text(
        json.dumps({"iou": {"<i>sky": 71.25, "b": None, "c": 3, "d": 4}})
    )
    (out / "config.json").write_text(json.dumps({"method": "stpp", "data": {"index": None, "split": None}}))
    (out / "provenance.json").write_text(json.dumps({"classes": ["<i>sky", "b", "c", "d"],
                                                     "versions": {"torch": "2.13.0"}}))
    return out
