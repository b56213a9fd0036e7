"""One training step: the engine against the public recipe and against tuned PyTorch, on batches in memory and
on image files.

    python benchmarks/bench_step.py --out benchmarks/results/last.jsonl
    python benchmarks/bench_step.py --backbone resnet18 --crop 161 --output-stride 16 --batch 8 --rounds 3

Peers, as their users run them: *public*: float32, NCHW, PyTorch's own dilated convolutions, cross-entropy of
full-size logits, plain SGD. *tuned*: the same with autocast in the engine's precision, channels_last and
fused SGD; *compiled*: tuned under torch.compile. The engine's step is the Trainer's own. All start from equal
weights and take the same images and labels; their first losses are compared before timing starts. On files
the engine has its own loader; public and tuned have a DataLoader with PIL and a worker process for each core,
half of the samples strong (`bench_data.py`). Where many cores queue many batches, these are used up first and
then a hundred steps in a row are timed.

Rows: milliseconds a step; `.compiled` engine and compiled peer, and `.regional` the engine without and with
`--train.compile`, measured last, because compiling takes minutes; `.files` with loading. Summaries: the parts
of the engine's step; `step.engine_vs_public_ratio`; `step.engine_vs_tuned_ratio` (against the faster of tuned
and compiled; with --no-compile `step.engine_vs_tuned_eager_ratio`); both again as `step.files_...`;
`step.engine_compile_ratio` (the gain of `--train.compile`);
images a second; the step's nominal operations a second over the measured rate of a large matrix product; on a
CPU, for networks that have them, the gains of the operators `depthwise_conv` and `batch_norm_clamp`
(`step.depthwise_conv_ratio`, `step.batch_norm_clamp_ratio`: the engine's own step without it over that with
it); and the share of the engine's step on files that waits for data (`step.data_wait_pct`).
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import bench_data
from harness import Report, arguments, bare_trainer, call_ms, nominal_flop, random_batch
from stpp.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from stpp.distributed import World
from stpp.inference import export
from stpp.loading.sample import Batch, Sample
from stpp.models.build import build_model
from stpp.models.layers import BatchNorm, DepthwiseConv
from stpp.precision import autocast_dtype
from stpp.processes import cores
from stpp.training.trainer import Trainer
from stpp_kernels import upsample_cross_entropy

CLASSES = 21
IGNORED = 0.1
TIMED_ON_MANY_CORES, TURNS_ON_MANY_CORES = 100, 2
"""Steps in a row on files, and turns of each variant, on machines with many cores."""
FUSED_LAYERS = {DepthwiseConv: "depthwise_conv", BatchNorm: "batch_norm_clamp"}
"""Layers that use an operator on a CPU."""
SMALL = {"rounds": 1, "backbone": "resnet18", "output_stride": 32, "crop": 33, "batch": 2, "no_compile": True,
         "pictures": 4}


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function of images [N, 3, H, W] and labels [N, H, W] that returns the loss."""


def engine(options: argparse.Namespace, device: torch.device, folder: Path,
           samples: Sequence[Sample] = (), *, compiled: bool = False) -> Trainer:
    """Builds the engine's trainer."""
    config = Config(
        data=DataConfig(root=folder), out=folder,
        model=ModelConfig(name=options.model, backbone=options.backbone, output_stride=options.output_stride,
                          pretrained="none"),
        augment=AugmentConfig(crop_px=options.crop),
        train=TrainConfig(batch_global=options.batch, precision=options.precision, compile=compiled),
        deterministic=not options.cudnn_benchmark)  # for a step alone it only stops cuDNN's search
    return bare_trainer(config, World(device=device), folder, CLASSES, samples)


def peer(network: nn.Module, *, dtype: torch.dtype, channels_last: bool, compiled: bool, lr: float) -> Step:
    """Builds a step as PyTorch's users write it: `network` with plain convolutions, the loss of full-size
    logits."""
    network = export.plain_copy(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4,
                                fused=True if channels_last else None)
    model = torch.compile(network) if compiled else network

    def step(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=layout)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            full = F.interpolate(model(images), targets.shape[1:], mode="bilinear", align_corners=True)
            loss = F.cross_entropy(full, targets, ignore_index=255)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def on_files(report: Report, options: argparse.Namespace, name: str, dtype: torch.dtype,
             peers: dict[str, Step], folder: Path) -> None:
    """Measures steps with loading, by the engine and by peers."""
    device, samples, workers = report.device, bench_data.samples_of(options, folder), cores()
    trainer = engine(options, device, folder, samples)
    batches, waits = trainer._passes(), []
    public = bench_data.Public(samples, options.crop, trainer.config.augment.long_side)

    def engine_step() -> None:
        passes, wait_s = next(batches)
        trainer.train_step(passes)
        waits.append(wait_s)

    def peer_step(label: str) -> None:
        images, labels = next(streams[label])
        peers[label](images.to(device, non_blocking=True), labels.to(device, non_blocking=True))

    streams = {label: iter(DataLoader(public, options.batch, num_workers=workers,
                                      pin_memory=device.type == "cuda"))
               for label in peers}
    variants = {"engine": engine_step, **{label: partial(peer_step, label) for label in peers}}
    many = workers >= bench_data.MANY_CORES and not options.small
    untimed, timed = (bench_data.untimed_batches(workers), TIMED_ON_MANY_CORES) if many else (0, 1)
    times: dict[str, list[float]] = {label: [] for label in variants}
    for variant in variants.values():
        variant()
    for _ in range(min(report.rounds, TURNS_ON_MANY_CORES) if many else report.rounds):
        for label, variant in variants.items():
            for _ in range(untimed):
                variant()
            times[label].append(call_ms(variant, device, calls=timed))
    shape, kind = f"{options.batch},3,{options.crop},{options.crop}", str(dtype).removeprefix("torch.")
    rows = {label: report.measured(f"{name}.files", label, shape, kind, found) for label,
            found in times.items()}
    step_ms = rows["engine"]["median"]
    for label in peers:
        report.summary(f"step.files_engine_vs_{label}_ratio", rows[label]["median"] / step_ms)
    report.summary("step.data_wait_pct", 100 * sum(waits[-timed:]) / (timed * times["engine"][-1] / 1000))


def parts(trainer: Trainer, batch: Batch, device: torch.device, rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of forward pass, loss, backward pass and optimiser, each
    synchronised."""
    found: dict[str, list[float]] = {"forward": [], "loss": [], "backward": [], "optimizer": []}
    for _ in range(rounds):
        marks = [_now(device)]
        with torch.autocast(device.type, trainer.autocast_dtype,
                            enabled=trainer.autocast_dtype != torch.float32):
            logits = trainer.step.network(batch.images_NCHW)
        marks.append(_now(device))
        total, counted = upsample_cross_entropy(logits, batch.labels_NHW)
        marks.append(_now(device))
        (total / counted).backward()
        marks.append(_now(device))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        marks.append(_now(device))
        for name, begin, end in zip(found, marks[:-1], marks[1:], strict=True):
            found[name].append((end - begin) * 1000)
    return {name: sorted(times)[len(times) // 2] for name, times in found.items()}


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations a second of a large square matrix product, the reference rate of a step."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begin = _now(device)
        a @ b
        best = min(best, _now(device) - begin)
    return 2 * side**3 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def parsed(description: str = __doc__) -> argparse.Namespace:
    """Parses the command line of every benchmark of a training step."""
    parser = arguments(description.splitlines()[0], SMALL)
    parser.add_argument("--model", default="deeplabv3plus", choices=["deeplabv3plus", "pspnet", "deeplabv2"])
    parser.add_argument("--backbone", default="resnet50",
                        choices=["resnet18", "resnet50", "resnet101", "efficientnet-lite0"])
    parser.add_argument("--output-stride", type=int, default=8, choices=[8, 16, 32])
    parser.add_argument("--crop", type=int, default=321, help="pixels")
    parser.add_argument("--batch", type=int, default=0, help="images; 0: 16 on a GPU, 2 on a CPU")
    bench_data.step_arguments(parser)
    parser.add_argument("--cudnn-benchmark", action=argparse.BooleanOptionalAction, default=True,
                        help="let cuDNN search its algorithms, as the engine and tuned users do; for all "
                             "variants")
    options = parser.parse_args()
    options.batch = options.batch or (16 if options.device.startswith("cuda") else 2)
    return options


def without(kind: type[nn.Module], trainer: Trainer, batch: Batch) -> Callable[[], torch.Tensor] | None:
    """Builds the engine's step with PyTorch's layers in place of the fused ones of a kind; None if its
    network has none on a CPU."""
    layers = [each for each in trainer.step.network.modules() if isinstance(each, kind)]
    if not layers or trainer.world.device.type != "cpu":
        return None

    def step() -> torch.Tensor:
        for layer in layers:
            layer.fused = False
        try:
            return trainer.train_step([(batch,)])[0]
        finally:
            for layer in layers:
                layer.fused = True

    return step


def agreeing(variants: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Takes one step of each and compares the losses."""
    losses = {label: variant().item() for label, variant in variants.items()}
    print("first losses:", {label: round(loss, 4) for label, loss in losses.items()}, flush=True)
    # dropout draws differ
    assert max(losses.values()) - min(losses.values()) < 0.05 * losses["engine"], losses


def main() -> None:
    options = parsed()
    report = Report(options)
    device = report.device
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    dtype = autocast_dtype(options.precision, device)
    torch.manual_seed(0)
    network = build_model(options.model, options.backbone, CLASSES, options.output_stride).to(device)
    batch = random_batch(options.batch, options.crop, CLASSES, device, ignored=IGNORED)
    images, targets = batch.images_NCHW, batch.labels_NHW.long()
    shape, kind = f"{options.batch},3,{options.crop},{options.crop}", str(dtype).removeprefix("torch.")
    name = f"step.{options.model}_{options.backbone}_os{options.output_stride}"

    with tempfile.TemporaryDirectory() as folder:
        trainer = engine(options, device, Path(folder))
        trainer.step.network.load_state_dict(network.state_dict())
        lr = trainer.optimizer.param_groups[0]["base_lr"]

        def other(dtype: torch.dtype, channels_last: bool,
                  compiled: bool = False) -> tuple[Step, Callable[[], torch.Tensor]]:
            step = peer(copy.deepcopy(network).train(), dtype=dtype, channels_last=channels_last,
                        compiled=compiled, lr=lr)
            theirs = images.contiguous(memory_format=torch.channels_last if channels_last
                                       else torch.contiguous_format)
            return step, lambda: step(theirs, targets)

        steps, variants = {}, {"engine": lambda: trainer.train_step([(batch,)])[0]}
        for label, layout in (("public", (torch.float32, False)), ("tuned", (dtype, True))):
            steps[label], variants[label] = other(*layout)
        agreeing(variants)
        for each in FUSED_LAYERS:
            if plain := without(each, trainer, batch):  # it alternates with the same weights
                variants[f"engine, plain {each.__name__}"] = plain
        rows = report.compare(name, shape, kind, variants)
        step_ms = rows["engine"]["median"]
        report.summary("step.engine_images_per_s", 1000 * options.batch / step_ms)
        report.summary("step.public_images_per_s", 1000 * options.batch / rows["public"]["median"])
        report.summary("step.engine_vs_public_ratio", rows["public"]["median"] / step_ms)
        for each, operator in FUSED_LAYERS.items():
            if row := rows.get(f"engine, plain {each.__name__}"):
                report.summary(f"step.{operator}_ratio", row["median"] / step_ms)
        share = nominal_flop(network, images, backward=True) / (step_ms / 1000) / matmul_rate(device, dtype)
        report.summary("step.engine_share_of_matmul_rate", share)
        for part, value in parts(trainer, batch, device, options.rounds).items():
            report.summary(f"step.engine_{part}_ms", value)
        ratio = rows["tuned"]["median"] / step_ms
        if not options.no_compile:
            trainer.step.network.load_state_dict(network.state_dict())
            both = {"engine": variants["engine"], "compiled": other(dtype, True, compiled=True)[1]}
            agreeing(both)
            compiled = report.compare(f"{name}.compiled", shape, kind, both)
            ratio = min(ratio, compiled["compiled"]["median"] / compiled["engine"]["median"])
        name_of_ratio = "tuned_eager" if options.no_compile else "tuned"
        report.summary(f"step.engine_vs_{name_of_ratio}_ratio", ratio)
        if not options.no_compile:
            regional = engine(options, device, Path(folder), compiled=True)
            for each in (trainer, regional):
                each.step.network.load_state_dict(network.state_dict())
            both = {"engine": variants["engine"],
                    "engine, --train.compile": lambda: regional.train_step([(batch,)])[0]}
            agreeing(both)
            compiled = report.compare(f"{name}.regional", shape, kind, both)
            report.summary("step.engine_compile_ratio", compiled["engine"]["median"]
                           / compiled["engine, --train.compile"]["median"])
        if not options.no_files:
            on_files(report, options, name, dtype, steps, Path(folder))
    report.finish()


if __name__ == "__main__":
    main()
