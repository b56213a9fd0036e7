"""Plots rows of benchmarks: a bar per variant, with a line from p20 to p80.

    python benchmarks/plot.py benchmarks/results/last.jsonl [--out FILE.png]
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="picture to write; unset: next to the first file")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = defaultdict(list)
    for path in options.rows:
        for row in map(json.loads, path.read_text().splitlines()):
            if "median" in row:
                groups[f"{row['name']} {row['shape']} {row['dtype']}"].append(row)
    if not groups:
        parser.error(f"{options.rows[0]} has no row with a median")
    figure, axes = pyplot.subplots(len(groups), 1,
                                   figsize=(8, 0.6 + sum(0.5 + 0.3 * len(rows) for rows in groups.values())),
                                   height_ratios=[1 + len(rows) for rows in groups.values()], squeeze=False)
    for axis, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
        names, medians = [row["variant"] for row in rows], [row["median"] for row in rows]
        spread = [[row["median"] - row["p20"] for row in rows], [row["p80"] - row["median"] for row in rows]]
        axis.barh(names, medians, xerr=spread, color="#4477aa", ecolor="#222222")
        axis.set_title(title, fontsize=8, loc="left")
        axis.invert_yaxis()
        axis.set_xlabel(rows[0]["unit"], fontsize=7)
        axis.tick_params(labelsize=7)
    figure.suptitle(next(iter(groups.values()))[0]["device"], fontsize=8)
    figure.tight_layout()
    out = options.out or options.rows[0].with_suffix(".png")
    figure.savefig(out, dpi=120)
    print(out)


if __name__ == "__main__":
    main()
