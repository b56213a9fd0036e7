"""Operators other than the loss against eager PyTorch: time and peak memory.

    python benchmarks/bench_ops.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_ops.py --only dilated_conv --rounds 3

`SECTIONS` lists the sections, one function each. Each adds rows and summary rows to the report.
"""

import argparse
import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import labelling_sections
from harness import Report, arguments, minimum_ratio
from stpp.models.efficientnet_lite import EfficientNetLite
from stpp.models.layers import BatchNorm, DepthwiseConv, normalised
from stpp_kernels import dilated_conv3x3, implementations
from stpp_kernels.dilated_conv import FORM_VARIABLE

ASPP_RATES = (12, 24, 36)
ASPP_MAPS = ("41x41", "63x63", "90x120")
LITE_IMAGES, LITE_CROP, LITE_STRIDE = 8, 241, 16
"""Crops of a step of EfficientNet-Lite0 on a small machine, and its output stride."""
SMALL = {"rounds": 1, "no_compile": True, "maps": ["9x9"], "lite_crop": 33}


def in_form(form: str, function: Callable) -> Callable:
    """Makes a function compute its dilated convolutions in a form."""
    return mock.patch.dict(os.environ, {FORM_VARIABLE: form})(function)


def dilated_conv(report: Report, options: argparse.Namespace) -> None:
    """Measures ASPP's three dilated convolutions together, 2048 to 256 channels, batch 4, channels_last;
    peer: F.conv2d."""
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
        # on CUDA "fused" is cuDNN until one of these is faster
        forms = ("taps", "triton") if report.device.type == "cuda" else ()
        with torch.no_grad():
            for other in (eager, *(in_form(form, fused) for form in forms)):
                for mine, theirs in zip(fused(), other(), strict=True):
                    torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02)
        for name, wrap in (("forward", forward), ("forward_backward", training)):
            rows = report.compare(
                f"dilated_conv.{name}", f"4,2048,{height},{width}", options.conv_dtype,
                {label: wrap(function) for label, function in variants.items()}
                | {form: in_form(form, wrap(fused)) for form in forms},
            )  # fmt: skip
            ratio = minimum_ratio([(rows["fused"], rows["eager"])])
            report.summary(f"dilated_conv.{name}_ratio_{height}x{width}", ratio)


def depthwise_conv(report: Report, options: argparse.Namespace) -> None:
    """Measures the depthwise convolutions of EfficientNet-Lite0 in a step, channels_last; peer: F.conv2d
    after F.pad.

    Summaries: the smallest ratio of every kind of layer, and that of their sums over all layers.
    """
    if report.device.type != "cpu":
        print("depthwise_conv: uses cuDNN here, nothing to compare")
        return
    dtype = getattr(torch, options.conv_dtype)
    ratios: dict[str, list[float]] = {}
    sums_ms: Counter[tuple[str, str]] = Counter()
    for (layer, size), count in depthwise_layers(options.lite_crop).items():
        (kernel, _), (stride, _), (dilation, _) = layer.kernel_size, layer.stride, layer.dilation
        fused = DepthwiseConv(layer.in_channels, kernel, stride=stride, dilation=dilation).to(dtype)
        plain = copy.deepcopy(fused)
        plain.fused = False
        x = torch.randn(LITE_IMAGES, layer.in_channels, *size).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        layers = {"fused": fused, "eager": plain}
        outputs = {label: one(x) for label, one in layers.items()}
        gradient = torch.randn_like(outputs["fused"])

        def backward(label, outputs=outputs, gradient=gradient, layers=layers, x=x):
            wanted = (x, layers[label].weight)
            return lambda: torch.autograd.grad(outputs[label], wanted, gradient, retain_graph=True)

        def training(label, gradient=gradient, layers=layers, x=x):
            return lambda: torch.autograd.grad(layers[label](x), (x, layers[label].weight), gradient)

        for mine, theirs in zip(backward("fused")(), backward("eager")(), strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=0.02, atol=0.02 * scale)
        kind = f"{kernel}x{kernel}_s{stride}_d{dilation}"
        shape = f"{','.join(map(str, x.shape))} {kind}"
        for name, wrap in (("backward", backward), ("forward_backward", training)):
            rows = report.compare(f"depthwise_conv.{name}", shape, options.conv_dtype,
                                  {label: wrap(label) for label in layers})  # fmt: skip
            ratio = minimum_ratio([(rows["fused"], rows["eager"])])
            ratios.setdefault(f"{name}_ratio_{kind}", []).append(ratio)
            for label, row in rows.items():
                sums_ms[name, label] += count * row["median"]
    for name, found in ratios.items():
        report.summary(f"depthwise_conv.{name}", min(found))
    summarise_layers(report, "depthwise_conv", sums_ms)


def summarise_layers(report: Report, operator: str, sums_ms: Mapping[tuple[str, str], float]) -> None:
    """Adds the times of all layers, by measurement and variant, as summaries."""
    for name in dict.fromkeys(name for name, _ in sums_ms):
        fused_ms, eager_ms = (sums_ms[name, label] for label in ("fused", "eager"))
        report.summary(f"{operator}.{name}_ms_all_layers", fused_ms)
        report.summary(f"{operator}.{name}_ratio_all_layers", eager_ms / fused_ms)


def depthwise_layers(crop: int) -> Counter[tuple[DepthwiseConv, tuple[int, int]]]:
    """Counts the network's depthwise layers by (layer, size of its input)."""
    return layers_of(DepthwiseConv, crop, lambda layer: (layer.in_channels, layer.kernel_size, layer.stride,
                                                         layer.dilation))


def layers_of(kind: type[nn.Module], crop: int, key: Callable) -> Counter[tuple[nn.Module, tuple[int, int]]]:
    """Counts EfficientNet-Lite0's layers of a kind by (layer, size of its input); one layer represents all
    with the same key and size."""
    found: Counter[tuple[nn.Module, tuple[int, int]]] = Counter()
    first: dict[tuple, nn.Module] = {}

    def note(layer, inputs):
        size = tuple(inputs[0].shape[2:])
        found[first.setdefault((*key(layer), size), layer), size] += 1

    with torch.device("meta"), torch.no_grad():
        network = EfficientNetLite("efficientnet-lite0", LITE_STRIDE)
        for module in network.modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(note)
        network(torch.empty(2, 3, crop, crop))
    return found


def batch_norm_clamp(report: Report, options: argparse.Namespace) -> None:
    """Measures batch norm with ReLU6 at all sizes of EfficientNet-Lite0 in a step, channels_last; peer:
    PyTorch's layers.

    Summaries: the smallest ratio, and that of the sums over all layers.
    """
    if report.device.type != "cpu":
        print("batch_norm_clamp: uses PyTorch's layers here, nothing to compare")
        return
    dtype, relu6 = getattr(torch, options.conv_dtype), nn.ReLU6(inplace=True)
    ratios: dict[str, list[float]] = {}
    sums_ms: Counter[tuple[str, str]] = Counter()
    for (layer, size), count in layers_of(BatchNorm, options.lite_crop,
                                          lambda layer: (layer.num_features,)).items():
        norms = {label: BatchNorm(layer.num_features, eps=layer.eps) for label in ("fused", "eager")}
        norms["eager"].fused = False
        x = torch.randn(LITE_IMAGES, layer.num_features, *size).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(x)

        def forward(label, norms=norms, x=x):
            return lambda: torch.no_grad()(normalised)(norms[label], x, relu6)

        def training(label, norms=norms, x=x, gradient=gradient):
            wanted = (x, norms[label].weight, norms[label].bias)
            return lambda: torch.autograd.grad(normalised(norms[label], x, relu6), wanted, gradient)

        torch.testing.assert_close(*(forward(label)().float() for label in norms), rtol=0.02, atol=0.02)
        for name, wrap in (("forward", forward), ("forward_backward", training)):
            rows = report.compare(f"batch_norm_clamp.{name}", ",".join(map(str, x.shape)), options.conv_dtype,
                                  {label: wrap(label) for label in norms})  # fmt: skip
            ratios.setdefault(name, []).append(minimum_ratio([(rows["fused"], rows["eager"])]))
            for label, row in rows.items():
                sums_ms[name, label] += count * row["median"]
    for name, found in ratios.items():
        report.summary(f"batch_norm_clamp.{name}_ratio", min(found))
    summarise_layers(report, "batch_norm_clamp", sums_ms)


SECTIONS = {
    "argmax": labelling_sections.argmax,
    "augmentation": labelling_sections.augmentation,
    "masks": labelling_sections.masks,
    "dilated_conv": dilated_conv,
    "depthwise_conv": depthwise_conv,
    "batch_norm_clamp": batch_norm_clamp,
}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], SMALL)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--conv-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--maps", nargs="+", default=ASPP_MAPS, help="maps of the dilated convolution, HxW")
    parser.add_argument("--lite-crop", type=int, default=LITE_CROP,
                        help="crop of EfficientNet-Lite0, px")
    parser.add_argument("--no-compile", action="store_true", help="skip the compiled peers")
    parser.add_argument("--graphs", action="store_true", help="the ten views also from a CUDA graph")
    options = parser.parse_args()
    # each view of test-time augmentation is a new shape, and compiled separately
    torch._dynamo.config.cache_size_limit = 64
    report = Report(options)
    print("implementations:", implementations(report.device.type))
    for name in options.only:
        SECTIONS[name](report, options)
    report.finish()


if __name__ == "__main__":
    main()
