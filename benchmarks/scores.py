"""Scores of runs, and the minutes of their stages, as rows for the README's table.

    python benchmarks/scores.py --out benchmarks/results/demo-cpu.jsonl demo-seed0=runs/demo/run

For each run NAME: NAME.minutes of all stages except the control, NAME.STAGE.miou_pct of each training stage,
and NAME.control.miou_pct if the run has one.
"""

import json
from pathlib import Path

from harness import Report, arguments


def add_rows(report: Report, name: str, run: Path) -> None:
    """Adds the rows of one finished run.

    Raises:
        FileNotFoundError: the run has no results.json.
    """
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    report.summary(f"{name}.minutes", sum(stage["seconds"] for stage in results["stages"]) / 60)
    for stage in [*results["stages"], *filter(None, [results.get("control")])]:
        if stage["miou"] is not None:
            report.summary(f"{name}.{stage.get('name', 'control')}.miou_pct", stage["miou"])


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    options = parser.parse_args()
    report = Report(options)
    for named in options.runs:
        name, _, run = named.partition("=")
        add_rows(report, name, Path(run))
