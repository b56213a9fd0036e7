"""Prints the summary values of a file of rows by part, the last of each name.

    python benchmarks/summary.py benchmarks/results/gpu/rows.jsonl
"""

import json
import sys
from pathlib import Path


def whole_rows(path: Path) -> list[dict]:
    """Reads the rows of a file; a truncated last line is skipped, and a missing file has no rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def described(rows: list[dict]) -> str:
    """Formats a line for each part and name."""
    last = {(row.get("part", ""), row["name"]): row["value"] for row in rows if "value" in row}
    if not last:
        return "no summary rows"
    return "\n".join(f"{part:<18} {name:<46} {value:.4g}" for (part, name), value in last.items())


if __name__ == "__main__":
    print(described(whole_rows(Path(sys.argv[1]))))
