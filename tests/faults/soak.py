"""Kills a run of ST++ any number of times, on tiny data, and compares it with an undisturbed one.

    python tests/faults/soak.py --kills 100 [--seed N]
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401  (paths of the packages)
import fault_cases as cases  # noqa: E402
from stpp.commands import synthetic  # noqa: E402
from stpp.dataset import index  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    killed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "data", seed=3, train=24, val=6)
        index.prepare(folder / "data", folder / "index", layout="voc", workers=1, progress=False)
        (folder / "tiny.toml").write_text(cases.RECIPE)
        command = ["train", "--recipe", str(folder / "tiny.toml"), "--data.root", str(folder / "data"),
                   "--data.index", str(folder / "index"), "--out"]
        ran = cases.run([*command, str(folder / "alone")], events=folder / "events")
        assert ran.returncode == 0, ran.stderr
        expected = cases.contents(folder / "alone")
        events = (folder / "events").read_text().splitlines()
        for number in range(options.kills):
            if killed >= options.kills:
                break
            points = cases.chosen(events, min(20, max(12, options.kills - killed)), options.seed + number)
            out = folder / f"run-{number}"
            kind = signal.SIGKILL if number % 3 < 2 else signal.SIGTERM
            # a signal that training only records comes again at the next event
            if kind == signal.SIGTERM:
                points = [point for point in points if point.startswith("step")]
            killed += cases.finish([*command, str(out)], folder, points, kind)
            wrong = cases.differing(cases.contents(out), expected)
            print(json.dumps({"run": number, "signal": kind.name, "deaths": killed, "differ": wrong}),
                  flush=True)
            if wrong:
                sys.exit(1)


if __name__ == "__main__":
    main()
