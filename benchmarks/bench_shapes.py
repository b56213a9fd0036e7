"""Cost of a new image size: first against second forward pass of a folded teacher.

    python benchmarks/bench_shapes.py --out benchmarks/results/last.jsonl

cuDNN plans each convolution anew for every shape, and a Triton kernel may be compiled for one, so labelling
images of many sizes pays for both in the first batch of each size. Sizes are drawn once and are all
different; every pass is synchronised. One additional size first warms up the work that does not depend on
sizes.

Rows: `shapes.forward` (the network), `shapes.ten_views` (labelling without files), variants first and second,
each over all sizes. Summaries: the difference of the medians, `..._first_costs_ms`, and the ratio over a
whole set, `..._first_over_second_ratio`.
"""

import random
import time
from collections.abc import Callable

import torch

import bench_teacher
from harness import Report, arguments
from stpp.inference.views import masks

SIDES_PX = (320, 500)
SMALL = {**bench_teacher.SMALL, "sizes": 2, "views_sizes": 1, "batch": 1, "sides": (33, 49)}


def drawn(count: int, sides: tuple[int, int]) -> list[tuple[int, int]]:
    """Draws different sizes (H, W)."""
    generator, found = random.Random(0), {}
    while len(found) < count:
        found[generator.randint(*sides), generator.randint(*sides)] = None
    return list(found)


def pass_ms(run: Callable[[torch.Tensor], object], images_NCHW: torch.Tensor) -> float:
    """Returns the milliseconds until everything is computed, the host's share included."""
    if images_NCHW.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run(images_NCHW)
    if images_NCHW.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def first_and_second(report: Report, name: str, precision: str, run: Callable[[torch.Tensor], object],
                     sizes: list[tuple[int, int]], batch: int) -> None:
    """Adds rows and summaries of one kind of pass; the first of the sizes warms up."""
    times: dict[str, list[float]] = {"first": [], "second": []}
    for number, size in enumerate(sizes):
        images_NCHW = bench_teacher.smooth(batch, *size, report.device)
        for found in times.values():
            took = pass_ms(run, images_NCHW)
            if number:
                found.append(took)
    shape = f"{batch},3, {len(sizes) - 1} sizes"
    rows = {label: report.measured(name, label, shape, precision, found) for label, found in times.items()}
    report.summary(f"{name}_first_costs_ms", rows["first"]["median"] - rows["second"]["median"])
    report.summary(f"{name}_first_over_second_ratio", sum(times["first"]) / sum(times["second"]))


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--model", default="deeplabv3plus")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--output-stride", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=2, help="images per pass")
    parser.add_argument("--sizes", type=int, default=12, help="number of sizes for passes of the network")
    parser.add_argument("--views-sizes", type=int, default=4, help="number of sizes for ten views")
    parser.set_defaults(sides=SIDES_PX)
    options = parser.parse_args()
    report = Report(options)
    with torch.inference_mode(False):
        plan = bench_teacher.plan_of(options, report.device)
        teacher = plan.eager()
    sizes = drawn(options.sizes + options.views_sizes + 2, options.sides)
    once, views = sizes[: options.sizes + 1], sizes[options.sizes + 1 :]
    first_and_second(report, "shapes.forward", plan.precision, teacher.logits, once, options.batch)
    first_and_second(report, "shapes.ten_views", plan.precision,
                     lambda images_NCHW: masks(teacher, images_NCHW, "stpp"),
                     views, options.batch)
    report.finish()


if __name__ == "__main__":
    main()
