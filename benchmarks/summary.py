"""Prints the summary values of a file of rows by part, the last of each name.

    python benchmarks/summary.py benchmarks/results/gpu/rows.jsonl
"""

import json
import sys
from pathlib import Path


def whole_rows(path: Path) -> list[dict]:
    """Rows of a file; a last line that was cut off is no row, and where there is no file there are none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def described(rows: list[dict]) -> str:
    """A line for each part and name."""
    last = {(row.get("part", ""), row["name"]): row["value"] for row in rows if "value" in row}
    if not last:
        return "no summary rows"
    return "\n".join(f"{part:<18} {name:<46} {value:.4g}" for (part, name), value in last.items())


if __name__ == "__main__":
    print(described(whole_rows(Path(sys.argv[1]))))
