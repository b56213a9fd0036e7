"""Fused upsample_cross_entropy against eager and compiled eager PyTorch: forward and backward, time and peak
memory.

    python benchmarks/bench_loss.py --out benchmarks/results/last.jsonl

Peer: `F.cross_entropy(F.interpolate(logits, size, mode="bilinear", align_corners=True), labels)`, as in the
public recipes, and the same under torch.compile. Labels are random (worst for branch prediction and caches)
and a tenth is ignored.

`--graphs` also times all but the compiled form from a CUDA graph: the GPU's time without the host's launches.
`--launches` times the Triton kernels with several tiles, warps and programs (`LAUNCHES`), also from a graph;
on a CPU they are interpreted, so their times mean nothing.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

if "--launches" in sys.argv and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when imported, which other imports do

from harness import Report, arguments, copy_bandwidth, graphed, minimum_ratio
from stpp_kernels import implementations, upsample_cross_entropy

SHAPES = [((16, 21, 81, 81), 321), ((16, 19, 181, 181), 721), ((4, 150, 128, 128), 512)]
SMALL = {"rounds": 1, "no_compile": True, "shapes": [((1, 5, 5, 6), 17)]}
LAUNCHES = ({"tile": 512, "warps": 4, "programs": 2048}, {"tile": 256, "warps": 2, "programs": 4096},
            {"tile": 256, "warps": 1, "programs": 4096}, {"tile": 128, "warps": 1, "programs": 8192})
"""Fields of stpp_kernels.triton.cross_entropy.Launch."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(logits, labels):
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full.float(), labels, ignore_index=255)


def fused(logits, labels):
    loss, counted = upsample_cross_entropy(logits, labels)
    return loss / counted


def training(loss: Callable, logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Returns a function that computes a loss with its backward pass."""
    def run() -> torch.Tensor:
        value = loss(logits, labels)
        # dropped immediately: a gradient kept between runs would be counted in the memory before
        torch.autograd.grad(value, logits)
        return value.detach()

    return run


def measure(report: Report, shape: tuple[int, ...], size: int,
            options: argparse.Namespace) -> dict[str, dict]:
    """Adds the rows of one shape, by variant, after checking that the variants agree."""
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    logits = (
        torch.randn(shape, device=report.device)
        .to(DTYPES[options.dtype])
        .to(memory_format=layout)
        .requires_grad_()
    )
    labels = torch.randint(shape[1], (shape[0], size, size), device=report.device)
    labels[torch.rand(labels.shape, device=report.device) < 0.1] = 255
    small_labels = labels.to(torch.uint8)
    variants = {"fused": training(fused, logits, small_labels), "eager": training(eager, logits, labels)}
    named = f"{','.join(map(str, shape))} to {size}"
    quick = dict(variants)
    if not options.no_compile:
        torch._dynamo.reset()
        variants["compiled eager"] = training(torch.compile(eager), logits, labels)
    agreeing(variants)
    rows = report.compare("loss.forward_backward", named, options.dtype, variants)
    if options.graphs:
        found = report.compare("loss.forward_backward.graph", named, options.dtype,
                               graphed(quick, report.device)).values()
        if shape == options.shapes[0][0] and len(found) == len(quick):
            fused_row, eager_row = found
            report.summary("loss.graph_fused_vs_eager_ratio", eager_row["median"] / fused_row["median"])
    if options.launches and (launched := launches(logits, small_labels, report.device)):
        report.compare("loss.launch", named, options.dtype, launched)
    return rows


def agreeing(variants: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Compares the results of the variants."""
    values = [variant() for variant in variants.values()]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-3)


def launches(logits: torch.Tensor, labels: torch.Tensor,
             device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns the Triton operator under each of `LAUNCHES`; none, with a printed line, if it takes no launch
    settings."""
    module = importlib.import_module("stpp_kernels.triton.cross_entropy")
    if not hasattr(module, "Launch"):
        print(f"launch settings are skipped: {module.__name__} has no Launch", flush=True)
        return {}

    def under(settings: dict[str, int]) -> Callable[[], torch.Tensor]:
        launch = module.Launch(**settings)

        def run() -> torch.Tensor:
            loss, counted, _ = module.upsample_cross_entropy(
                logits.detach(), labels, None, None, 255, True, launch
            )
            return loss / counted

        return run

    kind = "" if device.type == "cuda" else ", interpreted"
    variants = {f"tile {settings['tile']}, {settings['warps']} warps, {settings['programs']} "
                f"programs{kind}": under(settings)
                for settings in LAUNCHES}
    agreeing(variants)
    return graphed(variants, device)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.set_defaults(shapes=SHAPES)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true",
                        help="channels_last logits, as the engine's models return")
    parser.add_argument("--no-compile", action="store_true",
                        help="skip compiled eager (it takes minutes on a CPU)")
    parser.add_argument("--graphs", action="store_true", help="also from CUDA graphs")
    parser.add_argument("--launches", action="store_true", help="also with other launch settings")
    options = parser.parse_args()
    report = Report(options)
    print("implementations:", implementations(report.device.type))
    pairs, compiled_pairs, shares = [], [], []
    bandwidth = copy_bandwidth(report.device)
    for shape, size in options.shapes:
        rows = measure(report, shape, size, options)
        pairs.append((rows["fused"], rows["eager"]))
        if "compiled eager" in rows:
            compiled_pairs.append((rows["fused"], rows["compiled eager"]))
        element = torch.finfo(DTYPES[options.dtype]).bits // 8
        # logits, gradient, uint8 labels
        traffic = 2 * element * torch.Size(shape).numel() + shape[0] * size * size
        shares.append(traffic / bandwidth / (rows["fused"]["median"] / 1000))
    report.summary("loss.fused_vs_eager_ratio", minimum_ratio(pairs))
    if compiled_pairs:
        report.summary("loss.fused_vs_compiled_ratio", minimum_ratio(compiled_pairs))
    if all(row["peak_mib"] for pair in pairs for row in pair):
        report.summary("loss.fused_memory_share_of_eager",
                       max(f["peak_mib"] / e["peak_mib"] for f, e in pairs))
    report.summary("loss.copy_bandwidth_gb_s", bandwidth / 1e9)
    report.summary("loss.share_of_bandwidth_limit", min(shares))
    report.finish()


if __name__ == "__main__":
    main()
