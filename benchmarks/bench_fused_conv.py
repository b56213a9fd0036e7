"""A folded bottleneck with fused convolutions against PyTorch's: values and time.

    python benchmarks/bench_fused_conv.py --out benchmarks/results/last.jsonl

With batch norm folded, a block is three convolutions with bias, each followed by ReLU, the last after adding
the shortcut. PyTorch launches the convolution, the bias, the ReLU and the sum one by one;
`stpp.inference.fused` computes them in one pass. What cuDNN does not support has its message printed and no
row. On a CPU, which has no cuDNN, the fused form is composed of plain operators.

Rows: `fused_conv.bottleneck`, by type. Summaries, by type: `fused_conv.served` (1: by cuDNN), `.ratio` of
times, and the largest errors against float64, relative to the largest value: `.error`, `.eager_error`.
"""

import copy

import torch
from torch import Tensor, nn

from harness import Report, arguments
from stpp.inference import fold, fused
from stpp.models.resnet import Bottleneck

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = {"rounds": 1, "batch": 1, "width": 8, "map": "5x6", "dtypes": ["bf16", "fp32"]}


def bottleneck(width: int, dilation: int) -> nn.Module:
    """Builds a folded block of layer 3 at stride 8, in float64."""
    torch.manual_seed(0)
    block = Bottleneck(4 * width, width, 1, dilation, dilation, None)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return fold.fold_batch_norm(block.double().eval().requires_grad_(False))


def error(values: Tensor, truth: Tensor) -> float:
    """Returns the largest difference over the largest magnitude of the truth."""
    return ((values.double() - truth).abs().max() / truth.abs().max()).item()


def measure(report: Report, exact: nn.Module, images_NCHW: Tensor, name: str) -> None:
    """Adds rows and summaries of one type."""
    dtype = DTYPES[name]
    block = bottleneck(exact.conv1.out_channels, exact.conv2.dilation[0])
    block.to(report.device, dtype=dtype, memory_format=torch.channels_last)
    x_NCHW = images_NCHW.to(dtype).contiguous(memory_format=torch.channels_last)
    merged = fused.fuse(copy.deepcopy(block))
    try:
        merged(x_NCHW)
    except RuntimeError as refusal:
        print(f"{name}: not supported by cuDNN's fused convolutions: "
              f"{str(refusal).splitlines()[0][:160]}", flush=True)
        report.summary(f"fused_conv.served.{name}", 0.0)
        return
    report.summary(f"fused_conv.served.{name}", float(report.device.type == "cuda"))
    truth = exact(x_NCHW.double())
    report.summary(f"fused_conv.error.{name}", error(merged(x_NCHW), truth))
    report.summary(f"fused_conv.eager_error.{name}", error(block(x_NCHW), truth))
    rows = report.compare("fused_conv.bottleneck", ",".join(map(str, x_NCHW.shape)), name,
                          {"eager": lambda: block(x_NCHW), "fused": lambda: merged(x_NCHW)})
    report.summary(f"fused_conv.ratio.{name}", rows["eager"]["median"] / rows["fused"]["median"])


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--batch", type=int, default=16, help="images: eight, each with its mirror image")
    parser.add_argument("--map", default="45x60", help="HxW of the feature map")
    parser.add_argument("--width", type=int, default=256, help="channels of the 3x3 convolution")
    parser.add_argument("--dilation", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    report = Report(options)
    exact = bottleneck(options.width, options.dilation).to(report.device)
    height, width = map(int, options.map.split("x"))
    images_NCHW = torch.randn(options.batch, 4 * options.width, height, width, device=report.device).relu()
    for name in options.dtypes:
        measure(report, exact, images_NCHW, name)
    report.finish()


if __name__ == "__main__":
    main()
