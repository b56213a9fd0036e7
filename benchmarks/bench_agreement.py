"""Agreement of `stpp label` with the method in plain PyTorch: share of pixels with the same class.

    python benchmarks/bench_agreement.py --source DATA/camvid/images/val --images 101 \
        --teacher runs/camvid/stages/6-retrain/best.pt
    python benchmarks/bench_agreement.py --source DATA/camvid/images/val --backbone resnet50 --images 24 \
        --engines inductor:bf16

Nothing is timed. The plain form computes in float32, image by image, with ten views at full size
(`bench_label.py`: the public recipe). A pixel is a near-tie if its two largest mean probabilities differ by
less than `gate.MARGIN`. PNGs are compared exactly; decoders of JPEG differ by a grey level.

Rows of each engine: `agreement.<backend>-<precision>.raw` (share of all pixels) and `.outside` (share of the
pixels outside near-ties). Others: `agreement.decided` (share of pixels outside near-ties),
`agreement.images`, `agreement.classes` (number of classes in the plain masks).
"""

import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from bench_label import Pictures, copied, plain, public_probabilities, untrained_checkpoint
from harness import Report, arguments
from stpp import distributed
from stpp.config import LabelConfig
from stpp.images.masks import read_index_mask
from stpp.images.sources import open_source
from stpp.inference.gate import MARGIN
from stpp.inference.predictors import from_paths
from stpp.inference.views import VIEWS
from stpp.label.assignment import Assignment
from stpp.label.labels import label_corpus


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of images; unset: drawn pictures of 320 to 480 "
                                                    "pixels")
    parser.add_argument("--images", type=int, default=24, help="number of images, at most")
    parser.add_argument("--teacher", type=Path, help="checkpoint; unset: random weights")
    parser.add_argument("--backbone", default="resnet18", help="backbone with random weights")
    parser.add_argument("--tta", default="stpp", choices=list(VIEWS))
    parser.add_argument("--engines", nargs="+", default=["eager:fp32", "inductor:bf16"],
                        metavar="BACKEND:PRECISION")
    options = parser.parse_args()
    report = Report(options)
    here, (scales, mirrored) = distributed.World(device=report.device), VIEWS[options.tta]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = copied(options.source, options.images, folder)
        pictures = Pictures(paths)
        teacher = options.teacher or untrained_checkpoint(folder / "best.pt", options.backbone, pictures)
        for engine in options.engines:
            backend, _, precision = engine.partition(":")
            opening = from_paths([teacher], report.device, mode=options.tta, backend=backend,
                                 precision=precision)
            task = Assignment(source=open_source(str(folder / "source")), out=folder / engine,
                              config=LabelConfig(tta=options.tta))
            label_corpus(opening, task, here)
        network = plain(teacher, report.device)
        equal, equal_decided = torch.zeros(2, len(options.engines), dtype=torch.int64)
        pixels, decided, classes = 0, 0, set()
        for i, path in enumerate(tqdm(paths, desc="plain form", unit="image")):
            total = public_probabilities(network, pictures[i][0][None].to(report.device),
                                         options.tta)[0].cpu()
            truth, (first, second) = (
                total.argmax(0),
                total.topk(2, dim=0).values / (len(scales) * (1 + mirrored)),
            )
            clear = first - second >= MARGIN
            for j, engine in enumerate(options.engines):
                same = (
                    torch.from_numpy(read_index_mask(folder / engine / "masks" / f"{path.stem}.png")) == truth
                )
                equal[j] += same.sum()
                equal_decided[j] += (same & clear).sum()
            pixels, decided, classes = (
                pixels + truth.numel(),
                decided + int(clear.sum()),
                classes | set(truth.unique().tolist()),
            )
    for engine, same, same_clear in zip(options.engines, equal.tolist(), equal_decided.tolist(), strict=True):
        report.summary(f"agreement.{engine.replace(':', '-')}.raw", same / pixels)
        report.summary(f"agreement.{engine.replace(':', '-')}.outside", same_clear / max(decided, 1))
    report.summary("agreement.decided", decided / pixels)
    report.summary("agreement.images", len(paths))
    report.summary("agreement.classes", len(classes))
    report.finish()


if __name__ == "__main__":
    main()
