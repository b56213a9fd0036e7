"""Fused upsample_cross_entropy against eager and compiled eager PyTorch: forward and backward, time and peak memory.

    python benchmarks/bench_loss.py --out benchmarks/results/last.jsonl

Peer: `F.cross_entropy(F.interpolate(logits, size, mode="bilinear", align_corners=True), labels)`, as the public recipes have it,
and the same under torch.compile. Labels are random (worst for branch prediction and caches) and a tenth is ignored.
"""

import argparse

import torch
import torch.nn.functional as F

from harness import Report, arguments, copy_bandwidth, minimum_ratio
from stpp_kernels import implementations, upsample_cross_entropy

SHAPES = [((16, 21, 81, 81), 321), ((16, 19, 181, 181), 721), ((4, 150, 128, 128), 512)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(logits, labels):
    full = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return F.cross_entropy(full.float(), labels, ignore_index=255)


def fused(logits, labels):
    loss, counted = upsample_cross_entropy(logits, labels)
    return loss / counted


def measure(report: Report, shape: tuple[int, ...], size: int, options: argparse.Namespace) -> dict[str, dict]:
    """Rows of one shape, by variant; checks that the variants agree first."""
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    logits = torch.randn(shape, device=report.device).to(DTYPES[options.dtype]).to(memory_format=layout).requires_grad_()
    labels = torch.randint(shape[1], (shape[0], size, size), device=report.device)
    labels[torch.rand(labels.shape, device=report.device) < 0.1] = 255
    small_labels = labels.to(torch.uint8)

    def training(loss, target):
        def run():
            value = loss(logits, target)
            torch.autograd.grad(value, logits)  # dropped at once: a gradient kept from run to run would hide in "before"
            return value.detach()

        return run

    variants = {"fused": training(fused, small_labels), "eager": training(eager, labels)}
    if not options.no_compile:
        torch._dynamo.reset()
        variants["compiled eager"] = training(torch.compile(eager), labels)
    values = [variant() for variant in variants.values()]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-3, atol=1e-3)
    name = f"{','.join(map(str, shape))} to {size}"
    return report.compare("loss.forward_backward", name, options.dtype, variants)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--channels-last", action="store_true", help="logits as the engine's models give them")
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled eager (it takes minutes on a CPU)")
    options = parser.parse_args()
    report = Report(options)
    print("implementations:", implementations(report.device.type))
    pairs, compiled_pairs, shares = [], [], []
    bandwidth = copy_bandwidth(report.device)
    for shape, size in SHAPES:
        rows = measure(report, shape, size, options)
        pairs.append((rows["fused"], rows["eager"]))
        if "compiled eager" in rows:
            compiled_pairs.append((rows["fused"], rows["compiled eager"]))
        element = torch.finfo(DTYPES[options.dtype]).bits // 8
        traffic = 2 * element * torch.Size(shape).numel() + shape[0] * size * size  # logits, gradient, uint8 labels
        shares.append(traffic / bandwidth / (rows["fused"]["median"] / 1000))
    report.summary("loss.fused_vs_eager_ratio", minimum_ratio(pairs))
    if compiled_pairs:
        report.summary("loss.fused_vs_compiled_ratio", minimum_ratio(compiled_pairs))
    if all(row["peak_mib"] for pair in pairs for row in pair):
        report.summary("loss.fused_memory_share_of_eager", max(f["peak_mib"] / e["peak_mib"] for f, e in pairs))
    report.summary("loss.copy_bandwidth_gb_s", bandwidth / 1e9)
    report.summary("loss.share_of_bandwidth_limit", min(shares))
    report.finish()


if __name__ == "__main__":
    main()
