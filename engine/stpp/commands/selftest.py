"""Short trials of the installation: decode an image, one training step, one engine, every operator.

Each function returns a short description, or raises on failure; `stpp doctor` reports both.
"""

import io
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import stpp_kernels
from stpp.config import Config, ModelConfig, TrainConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.images import pixels
from stpp.images.planning import Planned
from stpp.images.reading import read_header
from stpp.images.sources import Item
from stpp.inference import build, choose, export, fold, tensorrt
from stpp.inference.record import Shapes
from stpp.loading.sample import Batch, Sample
from stpp.methods.supervised import Supervised
from stpp.precision import autocast_dtype
from stpp.processes import OtherLoad
from stpp.training.assemble import fresh_network
from stpp.training.trainer import Schedule, Trainer
from stpp_kernels import reference

TOLERANCE = 0.01
"""Operator error relative to the largest value: far above rounding (TF32 on GPUs), far below a wrong
build."""
THREAD_ROUNDS = 15
LEVELS = 4.0
"""Mean difference in grey levels (of 255) allowed between a decoded JPEG and its source."""
SHAPES = Shapes.parse(["1x33x33", "2x65x97", "2x129x193"])
ANY_RTX_GPU = "SM89"
"""Target GPU of TensorRT for RTX on machines without a GPU."""


class Tiny(nn.Module):
    """A network of two convolutions, for engines."""

    classifier_name = "classifier"
    least_px = 5

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=False), nn.BatchNorm2d(8),
                                      nn.ReLU())
        self.classifier = nn.Conv2d(8, 3, 1)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images_NCHW))


def decode(device: torch.device, *, dali: bool) -> str:
    """Decodes a JPEG with DALI or PIL."""
    truth_HWC = np.broadcast_to(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], (64, 96, 3))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(truth_HWC)).save(file, "JPEG", quality=95)
    data = file.getvalue()
    if dali:
        from stpp.images.decode_dali import DaliDecoder

        planned = Planned(item=Item(key="a", source="a.jpg", file="a.jpg"), position=0,
                          reading=read_header(data, exif=False), batch=0, error=None)
        with ThreadPoolExecutor(1) as pool:
            (decoded,) = DaliDecoder(device, 1, 1, pool).images([planned], [data])
        if not isinstance(decoded, torch.Tensor):  # DALI's failures fall back to PIL
            raise UserError("DALI did not decode a plain JPEG")
        decoded = decoded.cpu().numpy()
    else:
        decoded = pixels.decode(data)
    off = float(np.abs(decoded.astype(int) - truth_HWC).mean())
    if off > LEVELS:
        raise UserError(f"a decoded JPEG differs by {off:.1f} grey levels on average")
    return "decoded a JPEG"


def threads(count: int) -> str:
    """Compares a batch norm on one thread with the same on `count`, in turns; the slowest thread counts.

    Raises:
        UserError: one thread is as fast, because other processes use the same cores.
    """
    norm, images_NCHW = nn.BatchNorm2d(64), torch.randn(16, 64, 64, 64).to(memory_format=torch.channels_last)
    before, load = torch.get_num_threads(), OtherLoad()
    spent_s = {1: [], count: []}
    try:
        with torch.no_grad():
            for _ in range(THREAD_ROUNDS):
                for number, times in spent_s.items():
                    torch.set_num_threads(number)
                    norm(images_NCHW)
                    start = time.perf_counter()
                    for _ in range(10):
                        norm(images_NCHW)
                    times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    ratio = statistics.median(spent_s[1]) / statistics.median(spent_s[count])
    text = f"{count} threads are {ratio:.1f} times as fast as one"
    if ratio < 1:
        raise UserError(f"{text}{load.cause()}")
    return text


def train_step(device: torch.device) -> str:
    """One training step of a small network on random pixels."""
    config = Config(model=ModelConfig(backbone="resnet18", output_stride=32),
                    train=TrainConfig(batch_global=2))
    samples = [Sample(key=name, image=name, mask=name, width=65, height=65) for name in "ab"]
    world, classes = World(device=device), ("a", "b", "c")
    step = Supervised(fresh_network(config, world, classes, stage=1), config)
    trainer = Trainer(config, world, step, step.streams(config, samples), key=1, title="selftest",
                      classes=classes, folder=Path(), schedule=Schedule(steps=1, validate_steps=1),
                      validate=None)
    images_NCHW = torch.randn(2, 3, 65, 65, device=device).contiguous(memory_format=torch.channels_last)
    labels_NHW = torch.randint(0, 3, (2, 65, 65), dtype=torch.uint8, device=device)
    before = next(step.network.parameters()).detach().clone()
    loss, _ = trainer.train_step([(Batch(views=(images_NCHW,), labels_NHW=labels_NHW, indices=np.arange(2)),
                                   )])
    if not loss.isfinite() or torch.equal(before, next(step.network.parameters())):
        raise UserError(f"a training step had loss {loss.item()} or did not change the weights")
    return f"one training step in {str(autocast_dtype('auto', device)).removeprefix('torch.')}"


def engine(device: torch.device) -> str:
    """Compiles a tiny network with the fastest available backend, and compares it with eager."""
    backend = choose.fastest(build.available(device), device.type)
    if backend == "eager":
        return "no compiler for this device; teachers run in PyTorch"
    module, dtype = build.BACKENDS[backend], torch.float16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    folded = fold.ready(Tiny(), device=device, dtype=dtype)
    images_NCHW = torch.randn(2, 3, 65, 97, device=device,
                              dtype=dtype).contiguous(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        module.build(folded, Path(folder), shapes=SHAPES, device=device, dtype=dtype, frozen=True)
        compiled, eager = module.load(Path(folder), device=device)(images_NCHW), folded(images_NCHW)
        off = float((compiled - eager).abs().max() / eager.abs().max())
    if not off <= 0.05:
        raise UserError(f"an engine of {backend} differs by {off:.3g} of the largest logit")
    return f"compiled and ran a tiny engine with {backend}"


def tensorrt_build() -> str:
    """Builds an engine with TensorRT for RTX, which works without a GPU; does not run it."""
    folded = fold.ready(Tiny(), device=torch.device("cpu"), dtype=torch.float16)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "tiny.onnx"
        shapes = export.onnx(folded, graph, shapes=SHAPES, dtype=torch.float16)
        tensorrt.compile_onnx(graph, graph.with_suffix(".plan"), shapes=shapes, device=torch.device("cuda"),
                              capabilities=(ANY_RTX_GPU,))
    return f"built a tiny engine for {ANY_RTX_GPU}"


def operators(device: torch.device) -> str:
    """Compares every operator with its plain PyTorch form on small tensors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 9, 11, generator=generator).to(device)
    labels = torch.randint(0, 5, (2, 33, 41), generator=generator).to(torch.uint8).to(device)
    labels[:, :4] = 255
    kernel = torch.randn(4, 5, 3, 3, generator=generator).to(device)
    ops = torch.ops.stpp_kernels
    depthwise = (logits.flip(2), logits, kernel[0, :, None], 1, 2, (2, 2, 2, 2), True, True)
    limits, scale, bias = (0.0, 6.0, 1e-3), labels.new_ones(5).float(), labels.new_zeros(5).float()
    _, *statistics = reference.batch_norm_clamp(logits, scale, bias, *limits)
    norm = (logits.flip(2), logits, *statistics, scale, bias, *limits)
    masks = stpp_kernels.upsample_argmax(logits, (33, 41))
    sums, plain_sums = (torch.zeros(2, 5, 33, 41, device=device) for _ in range(2))
    stpp_kernels.softmax_accumulate(sums, logits, (17, 21), (33, 41), True)
    reference.softmax_accumulate(plain_sums, logits, (17, 21), (33, 41), True)
    pairs = {
        "upsample_cross_entropy": (
            stpp_kernels.upsample_cross_entropy(logits, labels)[0],
            reference.upsample_cross_entropy(logits, labels, None, None, 255, False)[0],
        ),
        "upsample_argmax": (masks, reference.upsample_argmax(logits, (33, 41))[0]),
        "softmax_accumulate": (sums, plain_sums),
        "finalize": (stpp_kernels.finalize(plain_sums)[2], reference.finalize(plain_sums)[2]),
        "confusion": (
            stpp_kernels.confusion(masks, labels, 5),
            reference.confusion(masks, labels, 5, 255).sum(0),
        ),
        "dilated_conv3x3": (
            stpp_kernels.dilated_conv3x3(logits, kernel, 3),
            reference.dilated_conv3x3(logits, kernel, 3),
        ),
        "depthwise_conv": tuple(
            torch.cat([gradient.flatten() for gradient in backward(*depthwise)])
            for backward in (ops.depthwise_conv_backward, reference.depthwise_conv_backward)
        ),
        "batch_norm_clamp": tuple(
            torch.cat([each.flatten() for each in (*forward(logits, scale, bias, *limits), *backward(*norm))])
            for forward, backward in (
                (ops.batch_norm_clamp, ops.batch_norm_clamp_backward),
                (reference.batch_norm_clamp, reference.batch_norm_clamp_backward),
            )
        ),
    }
    for name, (fused, plain) in pairs.items():
        fused, plain = fused.double(), plain.double()
        if name == "upsample_argmax":  # ties may resolve differently
            off = float((fused != plain).double().mean())
        else:
            off = float((fused - plain).abs().max() / plain.abs().max().clamp(min=1))
        if not off <= TOLERANCE:
            raise UserError(f"{name} differs by {off:.3g} from its plain PyTorch form")
    return f"{len(pairs)} operators agree with their plain forms"
