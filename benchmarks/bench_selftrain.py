"""All six stages of ST++ on the demonstration's data: the engine against the public recipe, by stage, files
to files.

    python benchmarks/bench_selftrain.py --out benchmarks/results/selftrain-cpu.jsonl

The engine: `torchrun -m stpp train` on two ranks, as `make demo` starts it. The public recipe: one process
with all threads, a DataLoader of as many worker processes, PIL, float32 NCHW, cross-entropy of full-size
logits, plain SGD; selection, labelling and validation image by image. It uses the engine's split, and takes
as many steps and validations in every stage; views of labelling are the recipe's. Epochs are the
demonstration's divided by `--shorten`, which affects both equally.

Rows: milliseconds a stage, and of the whole (for the engine with its start, preparation of the data and
report). Summaries: `selftrain.engine_vs_public_ratio` (whole), the ratio of every stage, and the scores of
the last stages.
"""

import argparse
import copy
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

import bench_data
import bench_label
from harness import Report, arguments
from stpp import files
from stpp.commands import demo, synthetic
from stpp.config import AugmentConfig, Config, to_dict
from stpp.dataset import index, splits
from stpp.inference import export
from stpp.loading.sample import Sample
from stpp.metrics import mean_iou
from stpp.models.build import build_model, parameter_groups
from stpp.processes import cores
from stpp.training.optimizer import REFERENCE_BATCH
from stpp.training.trainer import POLY_POWER


class Epoch(bench_data.Public):
    """Samples of the public recipe, each once."""

    def __len__(self) -> int:
        return len(self._samples)


class Public:
    """Timed stages of the public recipe."""

    def __init__(self, config: Config, known: index.Index, split: Path, out: Path, device: torch.device,
                 done: dict[str, dict]):
        self.config, self.out, self.device, self.done = config, out, device, done
        self.num_classes, self.workers = len(known.classes), cores()
        self.labelled = splits.read_split(split / splits.LABELED, known, labelled=True)
        self.unlabelled = splits.read_split(split / splits.UNLABELED, known, labelled=False)
        self.val = splits.read_split(split / splits.VAL, known, labelled=True)
        self.seconds: dict[str, float] = {}
        self.miou: dict[str, float] = {}

    def run(self) -> None:
        """Runs all stages."""
        best, thirds = self._timed("1-supervised", lambda: self._train("1-supervised", self.labelled * 2))
        order = self._timed("2-select", lambda: self._ranked(thirds))
        reliable, rest = order[: len(order) // 2], order[len(order) // 2 :]
        pseudo = self._timed("3-label", lambda: self._label(best, reliable, "3-label"))
        best, _ = self._timed("4-retrain", lambda: self._train("4-retrain", self._joint(pseudo)))
        pseudo += self._timed("5-label", lambda: self._label(best, rest, "5-label"))
        self._timed("6-retrain", lambda: self._train("6-retrain", self._joint(pseudo)))

    def _timed(self, name: str, do):
        began = time.perf_counter()
        found = do()
        self.seconds[name] = time.perf_counter() - began
        print(f"public {name}: {self.seconds[name]:.1f} s", flush=True)
        return found

    def _joint(self, pseudo: list[Sample]) -> list[Sample]:
        return self.labelled * -(-len(pseudo) // len(self.labelled)) + pseudo

    def _train(self, name: str, samples: list[Sample]) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        """Trains; returns the best network by validation, and those after each third."""
        config, steps, period = self.config, self.done[name]["steps"], self.done[name]["validate_steps"]
        train = config.train
        network = export.plain_copy(build_model(config.model.name, config.model.backbone, self.num_classes,
                                                config.model.output_stride)).to(self.device)
        lr = train.lr * train.batch_global / REFERENCE_BATCH
        backbone, head = parameter_groups(network)
        groups = [{"params": backbone, "base": lr},
                  {"params": head, "base": lr * (train.head_lr_multiplier or 10)}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=train.momentum, weight_decay=train.weight_decay)
        samples *= -(-train.batch_global // len(samples))
        loader = DataLoader(Epoch(samples, config.augment.crop_px, config.augment.long_side),
                            train.batch_global, shuffle=True, num_workers=self.workers, drop_last=True,
                            pin_memory=self.device.type == "cuda")
        step, best, best_miou, thirds = 0, network, -1.0, []
        while step < steps:
            for images, labels in loader:
                network.train()
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * (1 - step / steps) ** POLY_POWER
                full = F.interpolate(network(images.to(self.device)), labels.shape[1:], mode="bilinear",
                                     align_corners=True)
                loss = F.cross_entropy(full, labels.to(self.device), ignore_index=255)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()  # shown in the bar
                step += 1
                if step in (steps // 3, 2 * steps // 3, steps):
                    thirds.append(copy.deepcopy(network).eval())
                if step % period == 0 or step == steps:
                    miou = self._validate(network.eval())
                    if miou > best_miou:
                        best, best_miou = copy.deepcopy(network), miou
                if step == steps:
                    break
        self.miou[name] = best_miou
        return best, thirds

    @torch.no_grad()
    def _masks(self, networks: Sequence[torch.nn.Module], samples: Sequence[Sample]):
        """Yields the prediction of each network for every image in turn."""
        for images, _ in DataLoader(bench_label.Pictures([Path(sample.image) for sample in samples]), 1,
                                    num_workers=self.workers):
            images = images.to(self.device)
            yield [F.interpolate(network(images), images.shape[-2:], mode="bilinear",
                                 align_corners=True).argmax(1)[0].cpu().numpy()
                   for network in networks]

    def _confusion(self, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        counted = truth != 255
        pairs = truth[counted].astype(np.int64) * self.num_classes + predicted[counted]
        return np.bincount(pairs, minlength=self.num_classes**2).reshape(self.num_classes, self.num_classes)

    def _validate(self, network: torch.nn.Module) -> float:
        masks = (predicted for (predicted,) in self._masks([network], self.val))
        return mean_iou(torch.from_numpy(sum(self._confusion(_mask(sample.mask), predicted)
                                             for sample, predicted in zip(self.val, masks, strict=True))))

    def _ranked(self, networks: Sequence[torch.nn.Module]) -> list[Sample]:
        scores = [sum(mean_iou(torch.from_numpy(self._confusion(last, other))) for other in earlier)
                  for *earlier, last in self._masks(networks, self.unlabelled)]
        return [self.unlabelled[i] for i in np.argsort(-np.asarray(scores), kind="stable")]

    def _label(self, network: torch.nn.Module, samples: list[Sample], name: str) -> list[Sample]:
        folder = self.out / name
        bench_label.public(network.eval(), [Path(sample.image) for sample in samples], folder,
                           self.config.label.tta, self.device, self.workers)
        return [dataclasses.replace(sample, mask=str(folder / f"{Path(sample.image).stem}.png"), strong=True)
                for sample in samples]


def _mask(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def engine(config: Config, root: Path, out: Path) -> tuple[float, dict]:
    """Runs the engine; returns the seconds of the whole run, and its `results.json`."""
    recipe = out.with_suffix(".json")
    files.write_json(recipe, to_dict(config))
    began = time.perf_counter()
    code = demo.torchrun(["-m", "stpp", "train", "--recipe", str(recipe), "--data.root", str(root), "--out",
                          str(out)])
    assert code == 0, f"torchrun ended with {code}"
    return time.perf_counter() - began, json.loads((out / "results.json").read_text())


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shorten", type=int, default=3, help="divisor of the demonstration's epochs")
    parser.add_argument("--pictures", type=int, default=400, help="training pictures, 12 of them labelled")
    parser.add_argument("--side", type=int, nargs=2, default=synthetic.Difficulty().side_px,
                        help="range of the pictures' sides, pixels")
    parser.add_argument("--crop", type=int, default=demo.DEMO.augment.crop_px, help="pixels")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    report = Report(options)
    config = shortened(options)
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "data", train=options.pictures,
                           difficulty=synthetic.Difficulty(side_px=tuple(options.side)))
        for turn in range(report.rounds):
            out = folder / f"engine-{turn}"
            whole_s, results = engine(config, folder / "data", out)
            done = {stage["name"]: stage for stage in results["stages"]}
            known = index.load(out / "index")
            public = Public(config, known, out / "split", folder / f"public-{turn}", report.device, done)
            public.run()
            for stage, record in done.items():
                times.setdefault((stage, "engine"), []).append(1000 * record["seconds"])
                times.setdefault((stage, "public"), []).append(1000 * public.seconds[stage])
            times.setdefault(("whole", "engine"), []).append(1000 * whole_s)
            times.setdefault(("whole", "public"), []).append(1000 * sum(public.seconds.values()))
        size = config.augment.crop_px
        shape = f"{len(public.labelled)}+{len(public.unlabelled)}, crop {size}"
        dtypes = {"engine": config.train.precision, "public": "float32"}
        rows = {(stage, variant): report.measured(f"selftrain.{stage}", variant, shape, dtypes[variant],
                                                  found)
                for (stage, variant), found in times.items()}
    for stage in (*done, "whole"):
        ratio = rows[stage, "public"]["median"] / rows[stage, "engine"]["median"]
        report.summary("selftrain.engine_vs_public_ratio" if stage == "whole" else f"selftrain.{stage}_ratio",
                       ratio)
    for stage in ("1-supervised", "6-retrain"):
        report.summary(f"selftrain.engine_{stage}_miou_pct", done[stage]["miou"])
        report.summary(f"selftrain.public_{stage}_miou_pct", public.miou[stage])
    report.finish()


def shortened(options: argparse.Namespace) -> Config:
    """Builds the demonstration's recipe with fewer epochs, for the requested sizes of pictures."""
    train, drawn, resized = demo.DEMO.train, synthetic.Difficulty().side_px, demo.DEMO.augment.long_side
    long_side = tuple(round(ours * to / of) for ours, to,
                      of in zip(options.side, resized, drawn, strict=True))
    epochs, supervised = (max(1, count // options.shorten)
                          for count in (train.epochs, train.supervised_epochs))
    return dataclasses.replace(demo.DEMO, device="cuda" if options.device.startswith("cuda") else "cpu",
                               train=dataclasses.replace(
        train, epochs=epochs, supervised_epochs=supervised),
        augment=AugmentConfig(crop_px=options.crop, long_side=long_side))


if __name__ == "__main__":
    main()
