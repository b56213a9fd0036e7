"""Remedies for rare classes against none: IoU of the rare classes and of the others, over seeds.

    python benchmarks/bench_rare.py --out benchmarks/results/rare-made-cpu-bf16.jsonl
    python benchmarks/bench_rare.py --name camvid --root DATA/camvid --recipe camvid_stpp \
        --rare pole sign pedestrian bicyclist fence --out benchmarks/results/rare-camvid-cpu.jsonl

Without --root: 64 labelled pictures of the demonstration's kind, in which one class is a small disc in one
picture of eight, 0.2 % of the pixels; supervised, 480 steps of 8 crops. Every run is `stpp train`, in a
separate process. Finished runs (--work) are not repeated, nor, with --append, those whose rows are in the
file. Nothing is timed.

Rows of every run: miou_pct, others_miou_pct (without the rare classes), rare_miou_pct, and iou_pct of each
rare class, of the last stage's selected weights on the validation list; warned: 1 if the run named every rare
class. Rows of every variant: the means over the seeds.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Report, arguments
from stpp.commands import synthetic

VARIANTS = {
    "none": [],
    "weights": ["--rare.weights", "inverse-sqrt"],
    "effective": ["--rare.weights", "effective", "--rare.effective-pixels", "10000"],
    "sampling": ["--rare.sampling", "0.5"],
    "sampling-quarter": ["--rare.sampling", "0.25"],
    "logits": ["--rare.logit-adjustment", "1"],
    "ohem": ["--train.loss", "ohem-image"],
    "weights-sampling": ["--rare.weights", "inverse-sqrt", "--rare.sampling", "0.5"],
    "keep-share": ["--label.keep-share", "0.5"],
    "precision": ["--label.min-confidence", "auto", "--label.precision", "0.8", "--advise.share", "0.2"],
    "select": ["--label.select-by", "class"],
}
"""Flags of `stpp train` by the name of the variant; the last three are for methods that label images."""
OF_TRAINING = list(VARIANTS)[:8]
LAST = "warned"
"""Key of the last row of a run."""
MADE = ["--method", "supervised", "--data.layout", "voc", "--data.fraction", "64", "--model.backbone",
        "efficientnet-lite0", "--model.pretrained", "imagenet", "--augment.crop-px", "49",
        "--augment.long-side", "64", "160", "--train.epochs", "30", "--train.supervised-epochs", "30",
        "--train.batch-global", "8", "--train.optimizer", "adamw", "--train.lr", "0.001",
        "--train.weight-decay", "0.01", "--train.head-lr-multiplier", "4", "--train.recalibrate-bn", "64",
        "--train.validate-every", "100"]
"""Settings on the made set: 30 epochs of 16 steps."""
DIFFICULTY = synthetic.Difficulty(seldom="disc", seldom_radius=(0.08, 0.1), side_px=(80, 112))


def trained(out: Path, flags: list[str]) -> str:
    """Runs `stpp train`, and returns its log."""
    said = out.with_suffix(".log")
    if not (out / "results.json").exists():
        done = subprocess.run([sys.executable, "-m", "stpp", "train", *flags, "--out", str(out)],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        said.write_text(done.stderr)
    return said.read_text()


def scored(out: Path) -> dict[str, float]:
    """Reads the IoU by class, percent, of the last training stage."""
    stages = [stage["name"] for stage in json.loads((out / "results.json").read_text())["stages"]
              if stage["steps"]]
    return json.loads((out / "stages" / stages[-1] / "scores.json").read_text())["iou"]


def figures(iou: dict[str, float], rare: list[str]) -> dict[str, float]:
    """Computes the rows of a run."""
    there = {name: value for name, value in iou.items() if value is not None}
    found = {"miou_pct": statistics.fmean(there.values()),
             "others_miou_pct": statistics.fmean(value for name, value in there.items() if name not in rare),
             "rare_miou_pct": statistics.fmean(there[name] for name in rare)}
    return found | {f"iou_pct.{name}": there[name] for name in rare}


def earlier(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Reads the values of finished runs, by run and key, from the file that rows are appended to."""
    found: dict[str, dict[str, float]] = {}
    if options.append and options.out and options.out.exists():
        for row in map(json.loads, options.out.read_text().splitlines()):
            if name := re.fullmatch(r"(rare\..*\.seed\d+)\.(.+)", row["name"]):
                found.setdefault(name[1], {})[name[2]] = row["value"]
    return {run: values for run, values in found.items() if LAST in values}


def run(options: argparse.Namespace, report: Report, work: Path) -> None:
    root, flags = options.root, list(options.flags)
    if root is None:
        root = work / "data"
        if not root.exists():
            synthetic.generate(root, seed=0, train=160, val=60 if options.small else 200,
                               difficulty=DIFFICULTY)
        flags = [*MADE, *flags]
    if options.small:
        flags += ["--train.supervised-epochs", "1", "--train.epochs", "1"]
    recipe = ["--recipe", options.recipe] if options.recipe else []
    found: dict[str, list[dict[str, float]]] = {}
    known = earlier(options)
    for seed in options.seeds:
        for variant in options.variants:
            name = f"rare.{options.name}.{variant}.seed{seed}"
            if name not in known:
                out = work / f"{variant}-{seed}"
                said = trained(out, [*recipe, "--data.root", str(root), "--data.threads", "1", "--device",
                                     options.device, "--seed", str(seed), *flags, *VARIANTS[variant]])
                warned = all(f"warning: class {rare} " in said for rare in options.rare)
                known[name] = {**figures(scored(out), options.rare), LAST: float(warned)}
                for key, value in known[name].items():
                    report.summary(f"{name}.{key}", value)
            found.setdefault(variant, []).append(known[name])
    for variant, runs in found.items():
        for key in (key for key in runs[0] if key != LAST):
            report.summary(f"rare.{options.name}.{variant}.mean.{key}", statistics.fmean(
                values[key] for values in runs))


if __name__ == "__main__":
    parser = arguments(__doc__, {"seeds": [0], "variants": ["none", "sampling"]})
    parser.add_argument("--name", default="made", help="name of the data set, in the rows")
    parser.add_argument("--root", type=Path, help="data set; unset: the made one")
    parser.add_argument("--recipe", help="recipe of stpp train")
    parser.add_argument("--rare", nargs="+", default=["disc"], help="the rare classes")
    parser.add_argument("--variants", nargs="+", default=OF_TRAINING, choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder of the runs, kept; unset: a temporary one")
    parser.add_argument("flags", nargs="*", help="further flags of stpp train, after --")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(asked, Report(asked), asked.work or Path(temporary))
