"""Writes the README's table of measurements from the committed rows.

    python benchmarks/table.py

A line of the table is a summary row of one file in `benchmarks/results/`. A test fails where README and rows differ.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- rows: written by benchmarks/table.py -->", "<!-- end of rows -->"
LINES = (
    ("upsampling cross-entropy, forward and backward, smallest of three shapes", "eager", "loss-cpu", "loss.fused_vs_eager_ratio"),
    ("the same", "`torch.compile`d eager", "loss-cpu", "loss.fused_vs_compiled_ratio"),
    ("ten views of softmax, summed", "eager", "ops-labelling-cpu", "softmax_accumulate.fused_vs_eager_ratio"),
    ("confusion matrix", "eager", "ops-labelling-cpu", "confusion.fused_vs_eager_ratio"),
)
"""What, against what, file of rows, name of the summary row."""


def table() -> str:
    """The lines between the two marks.

    Raises:
        KeyError: a line has no row.
    """
    lines = ["| what | against | ratio | rows |", "|---|---|---|---|"]
    for what, against, file, name in LINES:
        value = values(file)[name]
        shown = f"{value:.0f}" if value >= 10 else f"{value:.1f}"
        lines.append(f"| {what} | {against} | {shown} | `{file}.jsonl`: `{name}` |")
    return "\n".join(lines)


def values(file: str) -> dict[str, float]:
    """Summary values of a file of rows, by name."""
    rows = map(json.loads, (ROOT / "benchmarks" / "results" / f"{file}.jsonl").read_text().splitlines())
    return {row["name"]: row["value"] for row in rows if "value" in row}


def filled(text: str) -> str:
    """A README with its table renewed."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
