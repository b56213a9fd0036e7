"""Operators 2 to 5 against eager PyTorch: time and peak memory.

    python benchmarks/bench_ops.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_ops.py --only dilated_conv --rounds 3

One function a section; `SECTIONS` lists them. Each adds rows and summary rows to the report.
"""

import argparse

import torch
import torch.nn.functional as F

import labelling_sections
from harness import Report, arguments, minimum_ratio
from stpp_kernels import dilated_conv3x3, implementations

ASPP_RATES = (12, 24, 36)
ASPP_MAPS = ("41x41", "63x63", "90x120")
SMALL = {"rounds": 1, "no_compile": True, "maps": ["9x9"]}


def dilated_conv(report: Report, options: argparse.Namespace) -> None:
    """ASPP's three dilated convolutions together, 2048 to 256 channels, batch 4, channels_last; peer:
    F.conv2d."""
    dtype = getattr(torch, options.conv_dtype)
    torch.manual_seed(0)

    def leaf(*shape):
        values = torch.randn(shape, device=report.device) * 0.02
        return values.to(dtype).to(memory_format=torch.channels_last).requires_grad_()

    weights = [leaf(256, 2048, 3, 3) for _ in ASPP_RATES]
    for height, width in [map(int, text.split("x")) for text in options.maps]:
        x = leaf(4, 2048, height, width)

        def fused(x=x):
            return [dilated_conv3x3(x, weight, rate) for weight,
                    rate in zip(weights, ASPP_RATES, strict=True)]

        def eager(x=x):
            pairs = zip(weights, ASPP_RATES, strict=True)
            return [F.conv2d(x, weight, padding=rate, dilation=rate) for weight, rate in pairs]

        def forward(function):
            return torch.no_grad()(function)

        def training(function, x=x):
            def run():
                outputs = function()
                torch.autograd.grad(outputs, [x, *weights], [output.detach() for output in outputs])

            return run

        variants = {"fused": fused, "eager": eager}
        if not options.no_compile:
            variants["compiled"] = torch.compile(eager, dynamic=False)
        with torch.no_grad():
            for mine, theirs in zip(fused(), eager(), strict=True):
                torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)
        for name, wrap in (("forward", forward), ("forward_backward", training)):
            rows = report.compare(
                f"dilated_conv.{name}", f"4,2048,{height},{width}", options.conv_dtype,
                {label: wrap(function) for label, function in variants.items()},
            )  # fmt: skip
            ratio = minimum_ratio([(rows["fused"], rows["eager"])])
            report.summary(f"dilated_conv.{name}_ratio_{height}x{width}", ratio)


SECTIONS = {
    "argmax": labelling_sections.argmax,
    "augmentation": labelling_sections.augmentation,
    "masks": labelling_sections.masks,
    "dilated_conv": dilated_conv,
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--conv-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--maps", nargs="+", default=ASPP_MAPS, help="of the dilated convolution, HxW")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled peers")
    parser.add_argument("--graphs", action="store_true", help="the ten views also from a CUDA graph")
    options = parser.parse_args()
    # a view of test-time augmentation is a shape, and each is compiled
    torch._dynamo.config.cache_size_limit = 64
    report = Report(options)
    print("implementations:", implementations(report.device.type))
    for name in options.only:
        SECTIONS[name](report, options)
    report.finish()


if __name__ == "__main__":
    main()
