"""Golden runs: hashes of the results of deterministic runs of ST++ and ST, to compare two versions of the
code on one machine.

    python tests/faults/golden_run.py FOLDER    # runs the stpp of PYTHONPATH; writes FOLDER/golden.json
    python tests/faults/golden_run.py FOLDER OTHER.json # and exits with 1 if OTHER.json differs

Hashes depend on the processor and on the versions of torch and DALI, so both sides must be made on one
machine.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

COMMON = ["--data.layout", "voc", "--data.fraction", "8", "--data.threads", "1", "--deterministic",
          "--device", "cpu",
          "--model.backbone", "resnet18", "--model.output-stride", "32", "--augment.crop-px", "49",
          "--augment.long-side", "36", "104",
          "--train.epochs", "2", "--train.supervised-epochs", "6", "--train.batch-global", "8", "--train.lr",
          "0.05",
          "--label.tta", "stpp", "--label.backend", "eager", "--control"]
RUNS = {
    "stpp-1": (1, ["--method", "stpp"]),
    "stpp-2-fp32-pil": (2, ["--method", "stpp", "--train.precision", "fp32", "--data.loader", "reference"]),
    "st-1-pspnet-accumulate": (1, ["--method", "st", "--model.name", "pspnet", "--train.accumulate", "2",
                                   "--label.tta", "flip"]),
}


def run(name: str, folder: Path) -> dict[str, str]:
    ranks, flags = RUNS[name]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(ranks)] if ranks > 1 \
        else [sys.executable]
    command = [*start, "-m", "stpp", "train", "--data.root", str(folder / "data"), *COMMON, *flags, "--out",
               str(folder / name)]
    # Threads are those of the machine's cores, as in the recorded runs.
    subprocess.run(command, check=True, env={key: value for key, value in os.environ.items()
                                             if key != "OMP_NUM_THREADS"})
    return {f"{name}/{key}": value for key, value in contents(folder / name).items()}


def contents(out: Path) -> dict[str, str]:
    """Hashes weights, masks, lists and scores below a run's stages."""
    import torch

    found = {}
    for path in sorted((out / "stages").rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.suffix == ".pt" and path.name != "last.pt":
            weights = torch.load(path, weights_only=True, map_location="cpu")["model"]
            digest = hashlib.sha256()
            for key, tensor in weights.items():
                digest.update(key.encode())
                digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()
        elif path.suffix in (".png", ".txt") and "tensorboard" not in name and "profile" not in name:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "DONE.json":
            done = json.loads(path.read_text())
            found[name] = json.dumps({key: done.get(key)
                                      for key in ("miou", "mean_reliability", "pseudo_label_miou", "steps")})
    return found


def main(folder: str, reference: str | None = None) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data").exists():
        generate(out / "data")
    found = {}
    for name in RUNS:
        found |= run(name, out)
    (out / "golden.json").write_text(json.dumps(found, indent=1, sort_keys=True))
    print(f"{out / 'golden.json'}: {len(found)} hashes")
    if reference:
        expected = json.loads(Path(reference).read_text())
        wrong = [key for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
        print("\n".join(f"differs: {key}" for key in wrong) or f"equal to {reference}")
        sys.exit(bool(wrong))


def generate(folder: Path) -> None:
    """Draws the data set of the demonstration; its module has moved between versions."""
    for module in ("stpp.commands.synthetic", "stpp.data.synthetic"):
        done = subprocess.run([sys.executable, "-c",
                               f"from {module} import generate; from pathlib import Path; "
                               f"generate(Path({str(folder)!r}), seed=3, train=40, "
                               "val=10)"], capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise SystemExit(done.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
