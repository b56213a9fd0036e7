"""Time of a training step by class of work, in milliseconds, from torch.profiler over a few of the engine's
steps.

    python benchmarks/bench_profile.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_profile.py --no-cudnn-benchmark   # cuDNN does not try its algorithms; in
                                                              # a separate process: it keeps its choices

On a GPU the device's time counts, each kernel for the operator that launched it. On a CPU the operators' own
time on the host counts, so convolutions' two gradients, computed by one operator, stay together there.
Summaries: `profile.CLASS_ms` (see `CLASSES`), `profile.gaps_ms` (nothing ran on the device, or on a CPU no
operator), `profile.host_ms` (the host's time of a step without waiting: the launches). Rows: `profile.step`,
a step without the profiler; `profile.aspp`, the pyramid alone.
"""

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import bench_step
from harness import Report, random_batch
from stpp.models.build import build_model

STEPS = 5
WARM_UP = 3
CLASSES = {
    "compiled": ("", r"^triton_"),
    "optimizer": (r"Optimizer\.step|_fused_sgd", ""),
    "gradient_norm": (r"_foreach_norm|linalg_vector_norm", ""),
    "loss": (r"upsample_cross_entropy", ""),
    "casts": (r"aten::to$|aten::_to_copy|ToCopyBackward", ""),
    "batch_norm": (r"batch_norm|BatchNorm", ""),
    "depthwise_conv_gradient": (r"depthwise_conv_backward", ""),
    "conv_input_gradient": (r"convolution_backward|dilated_conv3x3_backward", r"dgrad"),
    "conv_weight_gradient": (r"convolution_backward|dilated_conv3x3_backward", r"wgrad"),
    "conv_other_gradient": (r"convolution_backward|dilated_conv3x3_backward", ""),
    "conv_forward": (r"conv", ""),
    "relu": (r"relu|threshold_backward|ReluBackward", ""),
    "add": (r"aten::add_?$", ""),
    "upsample": (r"upsample_bilinear|UpsampleBilinear", ""),
}
"""Patterns of an operator or of one of its callers, and of the kernel. The first matching class gets the
time, `rest` the remainder; `compiled` are kernels of torch.compile, which combine several operators."""


def class_of(operators: Sequence[str], kernel: str) -> str:
    """Classifies a kernel by its name and the operators around it, innermost first."""
    for name, (operator, launched) in CLASSES.items():
        if any(re.search(operator, one) for one in operators) and re.search(launched, kernel):
            return name
    return "rest"


def class_ms(events: Iterable, *, on_device: bool) -> dict[str, float]:
    """Sums milliseconds by class over the host's events of a profile; on a GPU over the kernels that they
    launched."""
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        operators, caller = [], event
        while caller is not None:
            operators.append(caller.name)
            caller = caller.cpu_parent
        if on_device:
            for kernel in event.kernels:
                found[class_of(operators, kernel.name)] += kernel.duration / 1000
        else:
            found[class_of(operators, "")] += event.self_cpu_time_total / 1000
    return dict(found)


def busy_ms(events: Iterable) -> tuple[float, float]:
    """Returns the milliseconds in which anything ran on the device, and those from its first work to the end
    of its last."""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events
                   if event.device_type != DeviceType.CPU and not getattr(event, "is_user_annotation", False))
    if not spans:
        return 0.0, 0.0
    busy, until = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1000, (until - spans[0][0]) / 1000


def profiled(report: Report, step: Callable[[], object]) -> None:
    """Adds the summaries of a few steps under the profiler."""
    on_device = report.device.type == "cuda"
    _wait(report.device)
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device) as traced:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        _wait(report.device)
        whole_ms = 1000 * (time.perf_counter() - began)
    events = traced.events()
    found = class_ms(events, on_device=on_device)
    busy, span = busy_ms(events) if on_device else (sum(found.values()), whole_ms)
    for name in (*CLASSES, "rest"):
        if found.get(name):
            report.summary(f"profile.{name}_ms", found[name] / STEPS)
    report.summary("profile.unattributed_ms", max(0.0, busy - sum(found.values())) / STEPS)
    report.summary("profile.gaps_ms", max(0.0, span - busy) / STEPS)
    report.summary("profile.profiled_step_ms", whole_ms / STEPS)
    by = "self_device_time_total" if on_device else "self_cpu_time_total"
    print(traced.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=100), flush=True)


def host_ms(step: Callable[[], object], report: Report) -> float:
    """Returns the milliseconds until a step's last launch, with an idle device before: the host's own time
    without waiting."""
    times = []
    for _ in range(report.rounds):
        _wait(report.device)
        began = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - began))
    _wait(report.device)
    return median(times)


def aspp(report: Report, network: torch.nn.Module, batch: int, crop: int, stride: int,
         dtype: torch.dtype) -> None:
    """Adds the rows of the pyramid alone, forward, and forward with backward."""
    cells, channels = -(-crop // stride), network.backbone.channels[-1]
    c4 = torch.randn(batch, channels, cells, cells, device=report.device).to(dtype)
    c4 = c4.contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [weight for weight in network.head.parameters() if weight.requires_grad]

    def forward() -> torch.Tensor:
        with torch.autocast(report.device.type, dtype, enabled=dtype != torch.float32):
            return network.head(c4)

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, [c4, *weights], torch.ones_like(out))

    report.compare("profile.aspp", f"{batch},{channels},{cells},{cells}", str(dtype).removeprefix("torch."),
                   {"forward": torch.no_grad()(forward), "forward_backward": both})


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    options = bench_step.parsed(__doc__)
    report = Report(options)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    torch.manual_seed(0)
    batch = random_batch(options.batch, options.crop, bench_step.CLASSES, report.device,
                         ignored=bench_step.IGNORED)
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench_step.engine(options, report.device, Path(folder))
        for _ in range(WARM_UP):
            trainer.train_step([(batch,)])
        dtype = trainer.autocast_dtype
        shape = f"{options.batch},3,{options.crop},{options.crop}"
        report.compare("profile.step", shape, str(dtype).removeprefix("torch."),
                       {"engine": lambda: trainer.train_step([(batch,)])})
        report.summary("profile.host_ms", host_ms(lambda: trainer.train_step([(batch,)]), report))
        profiled(report, lambda: trainer.train_step([(batch,)]))
    network = build_model("deeplabv3plus", options.backbone, bench_step.CLASSES, options.output_stride)
    network.to(report.device, memory_format=torch.channels_last)
    aspp(report, network, options.batch, options.crop, options.output_stride, dtype)
    report.finish()


if __name__ == "__main__":
    main()
