"""Sorts the rows of run_gpu.sh into the files of the README's table, one for each part and kind of GPU.

    python benchmarks/take.py FOLDER/rows.jsonl ...     # then: python benchmarks/table.py

A row of part `step`, measured on an H100, goes to `results/step-h100.jsonl`. If a part was run more than
once, in one file or in several, the run of the latest date counts; rows that it lacks, because it was cut
off, are taken from earlier runs of the same commit. Files of other parts are kept.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import table
from summary import whole_rows

RESULTS = table.ROOT / "benchmarks" / "results"


def kept(rows: list[dict]) -> dict[str, list[dict]]:
    """Selects the rows of the last run of each part, by name of the file; devices not in `table.GPUS` are
    dropped."""
    runs: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        word = next((word for name, word in table.GPUS.items() if name in row.get("device", "")), None)
        if word is not None and "part" in row:
            runs[f"{row['part']}-{word}"][row["date"]].append(row)
    return {name: merged([by_date[date] for date in sorted(by_date, reverse=True)])
            for name, by_date in runs.items()}


def merged(runs: list[list[dict]]) -> list[dict]:
    """Adds to the first run the rows of the others, of the same commit, whose names it lacks."""
    found = list(runs[0])
    for run in runs[1:]:
        names = {row["name"] for row in found}
        found += [row for row in run if row["name"] not in names and row.get("git") == found[0].get("git")]
    return found


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for name, rows in kept([row for path in sys.argv[1:] for row in whole_rows(Path(path))]).items():
        (RESULTS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                               encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows of {rows[0]['date']}")
