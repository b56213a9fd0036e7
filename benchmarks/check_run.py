"""A whole run of ST++ on the demonstration's data, shortened: all six stages under torchrun, with a report.

    python benchmarks/check_run.py --out benchmarks/results/last.jsonl

Checks that all parts work together on new platforms (CUDA, NCCL); with so few steps its scores mean nothing.
The ranks are those of `stpp demo`: two, or the number of GPUs. Fails if a stage, a mask or the report is
missing. Summaries: seconds of each stage, `run.STAGE_s`, and of the whole with its start, `run.whole_s`.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

from harness import Report, arguments
from stpp import files
from stpp.commands import demo, synthetic
from stpp.config import to_dict

STAGES = ("1-supervised", "2-select", "3-label", "4-retrain", "5-label", "6-retrain")
SMALL = {"pictures": 16, "val": 2, "epochs": 1, "supervised_epochs": 1}


def missing(out: Path, stages: dict[str, dict], unlabelled: int) -> list[str]:
    """Lists the missing parts of a run."""
    masks = len(list(out.glob("stages/*-label/**/*.png")))
    lacking = [name for name in STAGES if name not in stages]
    lacking += [] if masks == unlabelled else [f"{unlabelled - masks} of {unlabelled} masks"]
    lacking += [] if (out / "report" / "index.html").exists() else ["report"]
    return lacking


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--pictures", type=int, default=60, help="training pictures, 12 of them labelled")
    parser.add_argument("--val", type=int, default=20, help="pictures for validation")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the last stages")
    parser.add_argument("--supervised-epochs", type=int, default=20, help="epochs of the first stage")
    options = parser.parse_args()
    report = Report(options)
    train = dataclasses.replace(demo.DEMO.train, epochs=options.epochs,
                                supervised_epochs=options.supervised_epochs)
    config = dataclasses.replace(demo.DEMO, device=report.device.type, train=train,
                                 label=dataclasses.replace(demo.DEMO.label, tta="none"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "data", train=options.pictures, val=options.val)
        files.write_json(folder / "recipe.json", to_dict(config))
        began = time.perf_counter()
        code = demo.torchrun(["-m", "stpp", "train", "--recipe", str(folder / "recipe.json"), "--data.root",
                              str(folder / "data"), "--out", str(folder / "run")])
        whole_s = time.perf_counter() - began
        assert code == 0, f"torchrun ended with {code}"
        results = json.loads((folder / "run" / "results.json").read_text())
        stages = {stage["name"]: stage for stage in results["stages"]}
        lacking = missing(folder / "run", stages, options.pictures - int(config.data.fraction))
        assert not lacking, lacking
    for name, stage in stages.items():
        report.summary(f"run.{name}_s", stage["seconds"])
    report.summary("run.whole_s", whole_s)
    report.finish()


if __name__ == "__main__":
    main()
