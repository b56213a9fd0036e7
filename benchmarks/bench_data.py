"""Loading and augmenting for a null consumer: DALI, the reference loader, and a DataLoader of worker
processes with PIL.

    python benchmarks/bench_data.py --out benchmarks/results/data-cpu.jsonl
    python benchmarks/bench_data.py --root DATA --layout camvid --batch 16 --crop 321

Half of the samples are weak, half strong, as in the later stages of self-training. All loaders have the same
cores: `--threads` threads, or as many worker processes. The peer is the public recipe: PyTorch's DataLoader
and a Dataset whose `__getitem__` follows the public code with PIL and NumPy (resize, pad, crop, flip; jitter,
gray, blur, cutout).

A loader keeps preparing after its turn until its queue is full. So a turn starts with untimed batches, which
empty the loader's queue and give the previous loader time to fill its own; then `--batches` are timed. DALI
is skipped where it is not installed. Summaries: images a second of each, `data.dali_vs_pil_ratio`,
`data.reference_vs_pil_ratio`.
"""

import argparse
import importlib.util
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch.utils.data import DataLoader, Dataset

from harness import Report, arguments
from stpp.commands import synthetic
from stpp.config import AugmentConfig
from stpp.dataset import index
from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.loading import loader
from stpp.loading.sample import Sample, Stream
from stpp.loading.sampler import StepSampler
from stpp.processes import cores

PICTURES = 96
SIDE_PX = (320, 480)
FOREVER = 1 << 30
MANY_CORES = 8
"""Number of workers from which a DataLoader's queue, two batches a worker, holds more than a short
measurement."""
SMALL = {"rounds": 1, "batch": 2, "batches": 1, "crop": 33, "pictures": 4}


def untimed_batches(workers: int) -> int:
    """Number of untimed batches: more than any loader with this number of workers holds in its queue."""
    return 2 * workers + 8 if workers >= MANY_CORES else 6


class Public(Dataset):
    """Samples augmented as in the public recipe."""

    def __init__(self, samples: list[Sample], crop: int, long_side: tuple[int, int]):
        self._samples, self._crop, self._long_side = samples, crop, long_side

    def __len__(self) -> int:
        return FOREVER

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self._samples[i % len(self._samples)]
        image, mask = Image.open(sample.image).convert("RGB"), Image.open(sample.mask)
        image, mask = self._placed(image, mask)
        if sample.strong:
            image = _coloured(image)
        pixels, labels = np.asarray(image, dtype=np.float32) / 255, np.array(mask)
        if sample.strong and random.random() < 0.5:
            pixels = pixels.copy()
            _cut_out(pixels, labels)
        pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(labels).long()

    def _placed(self, image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
        """Resizes, pads, crops, and mirrors at random."""
        factor = random.randint(*self._long_side) / max(image.size)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        image, mask = (
            image.resize(size, Image.Resampling.BILINEAR),
            mask.resize(size, Image.Resampling.NEAREST),
        )
        crop = self._crop
        width, height = (max(side, crop) for side in size)
        wide, wide_mask = Image.new("RGB", (width, height)), Image.new("L", (width, height), 255)
        wide.paste(image)
        wide_mask.paste(Image.fromarray(np.array(mask)))
        x, y = random.randint(0, width - crop), random.randint(0, height - crop)
        image, mask = (one.crop((x, y, x + crop, y + crop)) for one in (wide, wide_mask))
        if random.random() < 0.5:
            image, mask = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (image, mask))
        return image, mask


def _coloured(image: Image.Image) -> Image.Image:
    if random.random() < 0.8:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(random.uniform(0.5, 1.5))
        hue, saturation, value = image.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + np.uint8(random.uniform(-0.25, 0.25) * 255 % 256))
        image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
    return image


def _cut_out(pixels: np.ndarray, labels: np.ndarray) -> None:
    height, width = labels.shape
    area = random.uniform(0.02, 0.4) * height * width
    ratio = random.uniform(0.3, 1 / 0.3)
    tall, wide = min(int((area * ratio) ** 0.5), height), min(int((area / ratio) ** 0.5), width)
    y, x = random.randint(0, height - tall), random.randint(0, width - wide)
    pixels[y:y + tall, x:x + wide] = np.random.rand(tall, wide, 3)
    labels[y:y + tall, x:x + wide] = 255


def samples_of(options: argparse.Namespace, folder: Path) -> list[Sample]:
    """Returns samples with masks, every other one strong."""
    root, layout = options.root, options.layout
    if root is None:
        root, layout = folder / "data", "voc"
        synthetic.generate(root, train=options.pictures, val=1,
                           difficulty=synthetic.Difficulty(side_px=SIDE_PX))
    known = index.prepare(root, folder / "index", layout=layout, progress=False)
    with_mask = [image for image, entry in known.entries.items() if entry.mask is not None]
    return [known.sample(image, strong=i % 2 == 1) for i, image in enumerate(sorted(with_mask))]


def step_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every benchmark of steps, in memory and on files."""
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--root", type=Path, help="data set for the steps on files; unset: drawn pictures")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="number of drawn pictures")
    parser.add_argument("--no-files", action="store_true", help="skip the steps on files")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled peer")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--root", type=Path, help="data set; unset: drawn pictures of 320 to 480 pixels")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="number of drawn pictures")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--crop", type=int, default=321, help="pixels")
    parser.add_argument("--batches", type=int, default=0, help="batches of one measurement; 0: 12, or 100 on "
                                                               "many cores")
    options = parser.parse_args()
    report, device = Report(options), torch.device(options.device)
    threads = options.threads or cores()
    count = options.batches or (100 if threads >= MANY_CORES else 12)
    augment = AugmentConfig(crop_px=options.crop)
    with tempfile.TemporaryDirectory() as name:
        samples = samples_of(options, Path(name))

        def engine_loader(kind: str) -> Iterator:
            draws = StepSampler(len(samples), options.batch, seed=0, stage=1).micro_batches(0, FOREVER)
            return loader.pick(kind).train_batches(Stream(samples=samples), draws, augment=augment, seed=0,
                                                   stage=1, device=device, threads=threads)

        peer = DataLoader(Public(samples, options.crop, augment.long_side), options.batch,
                          num_workers=threads, prefetch_factor=2, pin_memory=device.type == "cuda",
                          persistent_workers=True)
        streams = {"reference": engine_loader("reference"), "pil workers": iter(peer)}
        if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
            streams = {"dali": engine_loader("dali"), **streams}

        def take(label: str, batches: int) -> None:
            for _ in range(batches):
                next(streams[label])

        rows = report.compare("data.train",
                              f"{count} x {options.batch},3,{options.crop},{options.crop}", "uint8",
                              {label: lambda label=label: take(label, count) for label in streams},
                              before=lambda label: take(label, untimed_batches(threads)))
    for label, row in rows.items():
        report.summary(f"data.{label.replace(' ', '_')}_images_per_s",
                       1000 * options.batch * count / row["median"])
    for label in streams.keys() - {"pil workers"}:
        report.summary(f"data.{label}_vs_pil_ratio", rows["pil workers"]["median"] / rows[label]["median"])
    report.finish()


if __name__ == "__main__":
    main()
