"""Teachers of every installed backend against eager and the public recipe: time by batch and size, compile
time, agreement.

    python benchmarks/bench_teacher.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_teacher.py --backbone resnet18 --output-stride 16 --precision fp32 --batches 1 8

Peers: `eager`, the folded network in the same precision, the engine's teacher without a compiler; `public`,
float32, NCHW, PyTorch's own dilated convolutions, image by image, measured with the first batch of every
size. The network has random weights: time does not depend on them. Its agreement with eager in float32 is
measured on smooth random images.

Rows: milliseconds of one forward pass over a batch, `teacher.forward` eager and public,
`teacher.forward.fused` eager with fused convolutions (on a GPU, where they may pay), `teacher.forward.NAME` a
compiled teacher with eager. Summaries: operations a second of eager; seconds to
compile, and to load another teacher's weights; agreement; the smallest ratio to eager over all shapes; the
number of images of the first size (one view) after which compiling pays off; and
`teacher.best_vs_public_ratio`: images a second of the best variant and batch, the smallest of all sizes.
"""

import argparse
import copy
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import Report, arguments, minimum_ratio, nominal_flop
from stpp.errors import UserError
from stpp.inference import build, export, gate
from stpp.inference.build import BACKENDS, PRECISIONS, Compilation
from stpp.inference.protocol import Predictor
from stpp.inference.record import ANY_SIZE, Shapes, weights_sha256
from stpp.models.build import build_model
from stpp.precision import autocast_dtype

CLASSES = 21
Forward = Callable[[torch.Tensor], torch.Tensor]
SMALL = {"rounds": 1, "backbone": "resnet18", "output_stride": 32, "batches": [1], "sizes": ["33x49"]}


def plan_of(options: argparse.Namespace, device: torch.device, seed: int = 0) -> Compilation:
    """Builds a network with random weights, batch-norm statistics of data and a classifier that separates
    classes."""
    torch.manual_seed(seed)
    network = build_model(options.model, options.backbone, CLASSES, options.output_stride).train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # full statistics of this data, not a tenth of them
        seen_NCHW = smooth(4, 129, 129, torch.device("cpu"))
        network(seen_NCHW)
        spread = network.eval()(seen_NCHW).std()
        for name, value in network.named_parameters():
            if name.startswith(network.classifier_name):
                value.mul_(4 / spread)
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    return Compilation(network=network, architecture={"name": options.model, "backbone": options.backbone,
                                                      "output_stride": options.output_stride},
                classes=tuple(map(str, range(CLASSES))), weights=weights_sha256(network.state_dict()),
                       backend="eager",
                frozen=True, precision=names[autocast_dtype(options.precision, device)], device=device,
                       shapes=ANY_SIZE)


def smooth(count: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Draws pictures without noise, in the teachers' input format."""
    coarse = torch.randn(count, 3, 7, 9, device=device)
    images_NCHW = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return images_NCHW.contiguous(memory_format=torch.channels_last)


def compiled(report: Report, plan: Compilation,
             options: argparse.Namespace) -> Iterator[tuple[str, Predictor]]:
    """Returns teachers by the name of their variant; each is compiled on request, in a temporary folder."""
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    largest = (max(options.batches), *(max(size[i] for size in sizes) for i in (0, 1)))
    shapes = Shapes(smallest=(1, 33, 33), typical=(options.batches[len(options.batches) // 2], *sizes[0]),
                    largest=largest)
    for backend in options.backends or build.available(report.device):
        for frozen in (False, True) if backend == "inductor" and not options.frozen else (True,):
            label = f"{backend} unfrozen" if not frozen else backend
            chosen = Compilation(**{**vars(plan), "backend": backend, "frozen": frozen, "shapes": shapes})
            with tempfile.TemporaryDirectory() as folder:
                try:
                    teacher = build.build(chosen, Path(folder) / "engine")
                except UserError as error:  # the other rows stand without it
                    print(f"{label}: {error}", flush=True)
                    continue
                if not frozen:
                    other = plan_of(options, report.device, seed=1)
                    next_one = Compilation(**{**vars(chosen), "network": other.network,
                                              "weights": other.weights})
                    began = time.perf_counter()
                    build.load(Path(folder) / "engine", teacher.record, next_one)
                    report.summary(f"teacher.swap_s.{label}", time.perf_counter() - began)
            report.summary(f"teacher.compile_s.{label}", teacher.record.compile_s)
            images = [smooth(1, *sizes[0], report.device) for _ in range(4)]
            (found,) = gate.compare([teacher.logits], plan.eager("fp32").logits, images)
            report.summary(f"teacher.agreement_raw.{label}", found.raw)
            report.summary(f"teacher.agreement_outside_near_ties.{label}", found.outside)
            report.summary(f"teacher.decided.{label}", found.decided)
            yield label, teacher


def parsed() -> argparse.Namespace:
    """Parses the command line."""
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--model", default="deeplabv3plus")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--output-stride", type=int, default=8)
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all installed")
    parser.add_argument("--frozen", action="store_true", help="of inductor only the form with frozen "
                                                              "weights")
    parser.add_argument("--no-compile", action="store_true", help="eager and public only")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--sizes", nargs="+", default=["360x480", "720x960"], help="HxW")
    return parser.parse_args()


class Measured:
    """Forward passes by batch and size, and the time of an image at a variant's best batch."""

    def __init__(self, report: Report, options: argparse.Namespace, precision: str):
        self._report, self._options, self._precision = report, options, precision
        self.rows: dict[str, list[dict]] = defaultdict(list)
        self.image_ms: list[dict[str, float]] = [defaultdict(lambda: math.inf) for _ in options.sizes]

    def measure(self, name: str, teachers: dict[str, Forward], plain: torch.nn.Module | None = None) -> None:
        """Times teachers, and with the first batch of every size the public recipe's network image by
        image."""
        for size, image_ms in zip(self._options.sizes, self.image_ms, strict=True):
            for count in self._options.batches:
                images_NCHW = smooth(count, *map(int, size.split("x")), self._report.device)
                calls = {label: lambda run=run, x=images_NCHW: run(x) for label, run in teachers.items()}
                if plain is not None and count == self._options.batches[0]:
                    ones = [image.contiguous() for image in images_NCHW.split(1)]
                    calls["public"] = lambda ones=ones: [plain(one) for one in ones]
                found = self._report.compare(name, f"{count},3,{size.replace('x', ',')}", self._precision,
                                             calls)
                for label, row in found.items():
                    self.rows[f"{name}: {label}"].append(row)
                    image_ms[label] = min(image_ms[label], row["median"] / count)


@torch.inference_mode()
def main() -> None:
    options = parsed()
    report = Report(options)
    plan = plan_of(options, report.device)
    with torch.inference_mode(False):
        eager = plan.eager()
        # a copy: on CUDA, `to` moves parameters in place, and plain_copy shares them
        plain = export.plain_copy(copy.deepcopy(plan.network)).eval().to(report.device)
    measured = Measured(report, options, plan.precision)
    measured.measure("teacher.forward", {"eager": eager.logits}, plain)
    image = smooth(1, *map(int, options.sizes[0].split("x")), torch.device("cpu"))
    flop = nominal_flop(plan.network, image, backward=False)
    report.summary("teacher.eager_tflop_per_s", flop / measured.image_ms[0]["eager"] / 1e9)
    report.summary("teacher.eager_vs_public_ratio",
                   min(ms["public"] / ms["eager"] for ms in measured.image_ms))
    labels = ["eager"]
    if report.device.type == "cuda" or options.small:
        with torch.inference_mode(False):
            merged = plan.eager(fuse=True)
        measured.measure("teacher.forward.fused", {"eager fused": merged.logits, "eager": eager.logits})
        labels.append("eager fused")
    with torch.inference_mode(False):
        teachers = () if options.no_compile else compiled(report, plan, options)
        for label, teacher in teachers:
            with torch.inference_mode():
                name = f"teacher.forward.{label}"
                measured.measure(name, {label: teacher.logits, "eager": eager.logits})
            pairs = zip(measured.rows[f"{name}: {label}"], measured.rows[f"{name}: eager"], strict=True)
            report.summary(f"teacher.ratio.{label}", minimum_ratio(list(pairs)))
            ours_ms, eager_ms = measured.image_ms[0][label], measured.image_ms[0]["eager"]
            if ours_ms < eager_ms:
                report.summary(f"teacher.images_that_repay.{label}",
                               1000 * teacher.record.compile_s / (eager_ms - ours_ms))
            labels.append(label)
    report.summary("teacher.best_vs_public_ratio",
                   min(ms["public"] / min(ms[label] for label in labels) for ms in measured.image_ms))
    report.finish()


if __name__ == "__main__":
    main()
