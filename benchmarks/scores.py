"""Rows of what runs scored and how long their stages took, for the README's table.

    python benchmarks/scores.py --out benchmarks/results/demo-cpu.jsonl demo-seed0=runs/demo/run

For each run NAME: NAME.minutes of all stages but the control, NAME.STAGE.miou_pct of each stage that trains,
and NAME.control.miou_pct where the run has one.
"""

import json
from pathlib import Path

from harness import Report, arguments


def add_rows(report: Report, name: str, run: Path) -> None:
    """Rows of one run that is finished.

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
