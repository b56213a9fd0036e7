"""Labelling from files to files: the engine against the public recipe, in one run, on the same images and
views.

The public recipe: batch 1, fp32, eager, NCHW, logits and probabilities of every view at full size, PIL in a
DataLoader, a palette PNG each. Weights are random, which costs the same, and the masks of both are compared.

On a GPU a new size costs a plan for each convolution, and sometimes a kernel: labelling once before the clock
starts (`--warm-up all`, the default there) excludes that cost, `--warm-up none` with images of all sizes
measures it. `--size` gives all images one size. `--public-images` lets the public recipe label fewer images,
or none.

Rows: `label.end_to_end.<views>`, milliseconds an image (variants engine and public),
`label.images_per_s.<views>`, `label.time.<views>.<part>` (seconds of the engine's run, summed over threads),
`label.agreement.<views>` (share of equal pixels), `label.ratio.<views>`. The summary row
`label.engine_vs_public_ratio` is the ratio of ST++'s ten views.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness import Report, arguments, freed_memory_kept
from stpp import checkpoint, distributed
from stpp.commands import synthetic
from stpp.config import LabelConfig
from stpp.images.image_file import IMAGE_EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD
from stpp.images.masks import read_index_mask
from stpp.images.sources import open_source
from stpp.inference import export
from stpp.inference.predictors import from_paths
from stpp.inference.views import VIEWS
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus
from stpp.models.build import build_model
from stpp.models.trained import load_network

CLASSES = 11
SMALL = {"rounds": 1, "images": 2, "size": (33, 49), "backbone": "resnet18", "workers": 1, "backend": "eager"}


class Pictures(Dataset):
    """Normalised images, one at a time, as in the public loader."""

    def __init__(self, paths: list[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        with Image.open(self._paths[i]) as image:
            values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255)
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
        return (values - mean) / std, self._paths[i].stem


@torch.no_grad()
def public_probabilities(network: torch.nn.Module, images_1CHW: torch.Tensor, mode: str) -> torch.Tensor:
    """Sums the probabilities of one image over its views one by one, at full size: [1, C, H, W]."""
    scales, mirrored = VIEWS[mode]
    height, width = images_1CHW.shape[-2:]
    total = torch.zeros(())
    for scale in scales:
        size = (int(height * scale), int(width * scale))
        view = F.interpolate(images_1CHW, size, mode="bilinear", align_corners=True)
        for flip in (False, True)[: 1 + mirrored]:
            low = network(view.flip(3) if flip else view)
            probability = F.interpolate(low, size, mode="bilinear", align_corners=True).softmax(1)
            probability = probability.flip(3) if flip else probability
            total = total + F.interpolate(probability, (height, width), mode="bilinear", align_corners=True)
    return total


def public(network: torch.nn.Module, paths: list[Path], out: Path, mode: str, device: torch.device,
           workers: int) -> None:
    """Labels like the public code."""
    palette = [value for i in range(256) for value in (i * 37 % 256, i * 73 % 256, i * 109 % 256)]
    out.mkdir(parents=True)
    for images, (name,) in DataLoader(Pictures(paths), batch_size=1, num_workers=workers):
        total = public_probabilities(network, images.to(device), mode)
        mask = Image.fromarray(total.argmax(1)[0].cpu().numpy().astype(np.uint8)).convert("P")
        mask.putpalette(palette)
        mask.save(out / f"{name}.png")


def plain(path: Path, device: torch.device) -> torch.nn.Module:
    """Builds the network in the form of the public code."""
    return export.plain_copy(load_network(path)[0]).eval().to(device)


@torch.no_grad()
def settled(network: torch.nn.Module, pictures: Pictures) -> torch.nn.Module:
    """Gives random weights batch-norm statistics and a balanced classifier; otherwise all pixels would have
    one class."""
    images = torch.stack([pictures[i % len(pictures)][0][:, :129, :129] for i in range(4)])
    network.train()
    for _ in range(3):
        network(images)
    network.eval()
    logits = network(images)
    classifier = network.get_submodule(network.classifier_name)
    (layer,) = (module for module in classifier.modules() if isinstance(module, torch.nn.Conv2d))
    scale = 3 / logits.std((0, 2, 3))
    layer.weight *= scale.view(-1, 1, 1, 1)
    layer.bias.copy_((layer.bias - logits.mean((0, 2, 3))) * scale)
    return network


def untrained_checkpoint(path: Path, backbone: str, pictures: Pictures) -> Path:
    """Writes a checkpoint of an untrained network of stride 8 that predicts all of its classes."""
    torch.manual_seed(0)
    network = settled(build_model("deeplabv3plus", backbone, CLASSES, 8), pictures)
    checkpoint.save(path, model=network.state_dict(), classes=[f"class {i}" for i in range(CLASSES)],
                    architecture={"name": "deeplabv3plus", "backbone": backbone, "output_stride": 8})
    return path


def copied(source: Path | None, count: int, folder: Path, size: tuple[int, int] | None = None) -> list[Path]:
    """Copies the first images below `source`, or draws some, into the empty `folder/source`, optionally at
    one size (H, W)."""
    if source is None:
        synthetic.generate(folder / "data", train=count, val=0,
                           difficulty=synthetic.Difficulty(side_px=(320, 480)))
        source = folder / "data" / "JPEGImages"
    (folder / "source").mkdir()
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)[:count]
    paths = [Path(shutil.copy(path, folder / "source")) for path in found]
    for path in paths if size else ():
        with Image.open(path) as image:
            image.convert("RGB").resize(size[::-1]).save(path)
    return paths


def agreement(engine_masks: Path, public_masks: Path) -> float:
    """Returns the share of pixels with the same class."""
    same = total = 0
    for path in sorted(public_masks.glob("*.png")):
        a, b = read_index_mask(path), read_index_mask(engine_masks / path.name)
        same, total = same + int((a == b).sum()), total + a.size
    return same / total


def compare(report: "LabelReport", options: argparse.Namespace, mode: str, paths: list[Path], trained: Path,
            folder: Path) -> None:
    """Measures engine and public recipe in turn."""
    here = distributed.World(device=report.device)
    opening = from_paths([trained], report.device, mode=mode, backend=options.backend,
                         precision=options.precision)
    (opened,) = opening(len(paths))
    network = plain(trained, report.device)
    public_paths = paths if options.public_images is None else paths[: options.public_images]
    times: dict[str, list[float]] = {"engine": []} | ({"public": []} if public_paths else {})
    seconds: dict[str, float] = {}

    def engine(out: Path, corpus: Path) -> None:
        with freed_memory_kept():
            config = LabelConfig(tta=mode, batch_per_rank=options.batch)
            task = Assignment(source=open_source(str(corpus)), out=out, config=config)
            summary = label_corpus(lambda _: [opened], task, here)
        seconds.update(summary.seconds)

    def turn(name: str, images: Path, public_images: list[Path], clock: bool) -> None:
        counts = {"engine": len(list(images.iterdir())), "public": len(public_images)}
        for label in times:
            start = time.perf_counter()
            if label == "engine":
                engine(folder / f"engine-{mode}-{name}", images)
            else:
                public(network, public_images, folder / f"public-{mode}-{name}", mode, report.device,
                       options.workers)
            if clock:
                times[label].append((time.perf_counter() - start) * 1000 / counts[label])

    if options.warm_up == "one":
        few = folder / "few"
        few.mkdir(exist_ok=True)
        shutil.copy(paths[0], few)
        turn("warm", few, public_paths[:1], clock=False)
    elif options.warm_up == "all":
        turn("warm", folder / "source", public_paths, clock=False)
    for number in range(report.rounds):
        turn(str(number), folder / "source", public_paths, clock=True)
    sizes = {Image.open(path).size for path in paths}
    width, height = max(sizes)
    shape = f"{len(paths)} x {height}x{width}" + (f", {len(sizes)} sizes" if len(sizes) > 1 else "")
    for label, found in times.items():
        report.add({"name": f"label.end_to_end.{mode}", "variant": label, "shape": shape,
                    "warm_up": options.warm_up,
                    "dtype": opened.identity.partition("-")[2] if label == "engine" else "fp32",
                    "median": statistics.median(found),
                    "p20": min(found), "p80": max(found), "unit": "ms", "peak_mib": None,
                    "backbone": options.backbone})
    report.summary(f"label.images_per_s.{mode}", 1000 / statistics.median(times["engine"]))
    for part, value in seconds.items():
        report.summary(f"label.time.{mode}.{part}", value)
    if not public_paths:
        return
    ratio = statistics.median(times["public"]) / statistics.median(times["engine"])
    report.summary(f"label.ratio.{mode}", ratio)
    equal = agreement(folder / f"engine-{mode}-0" / "masks", folder / f"public-{mode}-0")
    report.summary(f"label.agreement.{mode}", equal)
    assert equal > (0.98 if opened.identity.endswith("fp32")
                    else 0.9), f"{mode}: only {equal:.4f} of the pixels agree"
    if mode == "stpp":
        report.summary("label.engine_vs_public_ratio", ratio)


class LabelReport(Report):
    """Report whose rows are measured by `compare`."""

    def add(self, row: dict) -> None:
        """Adds a row with all columns."""
        self._add(row)


def size_of(text: str) -> tuple[int, int]:
    """Parses `360x480` as (360, 480)."""
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--source", type=Path, help="folder of images; unset: drawn pictures of 320 to 480 "
                                                    "pixels")
    parser.add_argument("--images", type=int, default=24, help="number of images, at most")
    parser.add_argument("--size", type=size_of, metavar="HxW",
                        help="common size of all images; unset: their own")
    parser.add_argument("--public-images", type=int, help="number that the public recipe labels; unset: all")
    parser.add_argument("--warm-up", choices=["none", "one", "all"],
                        help="images labelled before the clock starts; "
                        "unset: all on a GPU, else one")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--tta", nargs="+", default=["none", "flip", "stpp"], choices=list(VIEWS))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--backend", default="auto", help="the engine's backend; compiling is not timed")
    parser.add_argument("--batch", type=int, default=8, help="images in a batch of the engine")
    parser.add_argument("--workers", type=int, default=2, help="workers of the public recipe's DataLoader")
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    report = LabelReport(options)
    options.warm_up = options.warm_up or ("all" if report.device.type == "cuda" else "one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = copied(options.source, options.images, folder, options.size)
        trained = untrained_checkpoint(folder / "best.pt", options.backbone, Pictures(paths))
        for mode in options.tta:
            compare(report, options, mode, paths, trained, folder)
    report.finish()


if __name__ == "__main__":
    main()
