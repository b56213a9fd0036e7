"""Variants of the Triton kernels that real calls request, and their compilation for sm_90; neither needs a
GPU.

A separate program, because Triton decides when a kernel is defined whether it is interpreted (as in the other
tests), and because it takes the package `triton` that comes first on PYTHONPATH.

    python compile_cases.py compile --classes 2 21 --full --jobs 2    # a JSON line for each requested variant
    python compile_cases.py grids    # the largest axis of a grid that has a small limit
    python compile_cases.py count    # variants of each kernel that a set of photographs requests
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stpp_kernels.triton import dilated_conv
from stpp_kernels.triton.argmax import upsample_argmax
from stpp_kernels.triton.confusion import confusion
from stpp_kernels.triton.cross_entropy import upsample_cross_entropy
from stpp_kernels.triton.label_probability import label_probability
from stpp_kernels.triton.softmax_accumulate import finalize, softmax_accumulate

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
ODD, ODD_FULL = (33, 47), (131, 187)
"""Sizes whose strides have no divisor useful to a compiler."""
EVEN, EVEN_FULL = (32, 48), (128, 192)
"""Sizes whose strides are all divisible by 16."""
VIEWS = (0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class Variant:
    """Kernel as specialised for one call."""

    label: str
    kernel: JITFunction
    kwargs: dict
    bound: dict
    specialization: list
    """Type and, if specialised, property (1, or divisible by 16) of every argument."""
    options: dict

    @classmethod
    def of(cls, label: str, kernel: JITFunction, args: tuple, kwargs: dict) -> "Variant":
        kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}  # as JITFunction.run does
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        return cls(label, kernel, kwargs, *bind(*args, **kwargs))

    @property
    def key(self) -> str:
        """Key of the compiled kernel in Triton's cache."""
        return f"{self.kernel.__name__} {self.specialization} {self.options}"

    def compiled(self) -> triton.compiler.CompiledKernel:
        options, signature, constexprs, attrs = self.kernel._pack_args(
            BACKEND, self.kwargs, self.bound, self.specialization, self.options
        )
        return triton.compile(ASTSource(self.kernel, signature, constexprs, attrs), TARGET, options.__dict__)


@contextlib.contextmanager
def recorded(label: str, variants: dict[str, Variant]) -> Iterator[None]:
    """Records the variant of every launch in `variants`, by key, instead of running it."""

    def record(kernel, *args, grid, warmup, **kwargs):
        variant = Variant.of(label, kernel, args, kwargs)
        variants.setdefault(variant.key, variant)

    with launching(record):
        yield


@contextlib.contextmanager
def launching(record: Callable) -> Iterator[None]:
    """Calls `record` with the arguments of every launch instead of running it."""
    run, check = JITFunction.run, torch._assert_async
    # the kernel did not write its results
    JITFunction.run, torch._assert_async = record, lambda *_: None
    try:
        yield
    finally:
        JITFunction.run, torch._assert_async = run, check


def logits(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=format)


def loss_calls(classes: int, low: torch.Tensor, size: tuple[int, int], full: bool) -> None:
    for labels, weighted, gradient in [(torch.uint8, False, True), (torch.int64, True, True),
                                       (torch.uint8, False, False)]:
        if full or gradient and not weighted:
            labels_NHW = torch.empty((low.shape[0], *size), dtype=labels)
            weights = (torch.empty(classes), torch.empty(labels_NHW.shape)) if weighted else (None, None)
            upsample_cross_entropy(low, labels_NHW, *weights, 255, gradient)


def label_calls(low: torch.Tensor, size: tuple[int, int]) -> None:
    for confidence in (False, True):
        upsample_argmax(low, list(size), confidence)
    sums = torch.empty(low.shape[0] // 2, low.shape[1], *size)
    for scaled in (size, (size[0] // 2, size[1] // 2)):
        softmax_accumulate(sums, low, list(scaled), list(size), False, True)
        softmax_accumulate(torch.cat([sums, sums]), low, list(scaled), list(size), True, False)
    finalize(sums)


def convolution_calls(channels_in: int, channels_out: int, dtype: torch.dtype) -> None:
    """Records the three products of a dilated convolution of ASPP's maps."""
    x, out = (logits((4, channels, 41, 41), dtype, True) for channels in (channels_in, channels_out))
    weight = logits((channels_out, channels_in, 3, 3), dtype, True)
    dilated_conv.forward(x, weight, 12, out)
    dilated_conv.input_gradient(out, weight, 12, x)
    dilated_conv.weight_gradient(out, x, 12, weight)


def calls(classes: int, full: bool) -> dict[str, Variant]:
    """Records variants of all kernels for this number of classes; all dtypes, layouts and options if
    `full`."""
    variants: dict[str, Variant] = {}
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if full else (torch.bfloat16,)
    for dtype, channels_last in itertools.product(dtypes, (False, True) if full else (True,)):
        for low, size in [(ODD, ODD_FULL), (EVEN, EVEN_FULL)]:
            with recorded(f"C = {classes}, {str(dtype)[6:]}", variants):
                low_NChw = logits((2, classes, *low), dtype, channels_last)
                loss_calls(classes, low_NChw, size, full)
                label_calls(low_NChw, size)
    for pred, target, both in [(torch.uint8, torch.uint8, True), (torch.uint8, torch.int64, False)]:
        with recorded(f"C = {classes}", variants):
            shape = (2, *ODD_FULL)
            confusion(torch.empty(shape, dtype=pred), torch.empty(shape, dtype=target), classes, 255, True,
                      both)
    for dtype in dtypes[-2:]:
        for channels in (classes, 256):
            with recorded(f"2048 to {channels} channels, {str(dtype)[6:]}", variants):
                convolution_calls(2048, channels, dtype)
    return variants


def resources(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Returns registers, bytes of stack (for spilled registers) and of local memory a thread, and bytes of
    shared memory a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in found.split("Function")[1].split()[1:]
                  if field.count(":") == 1)
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    return {name: int(fields[field]) for name, field in names.items()} | {"shared": compiled.metadata.shared}


def row(variant: Variant) -> dict:
    """Compiles one variant and returns its row."""
    warps = variant.kwargs.get("num_warps", 4)
    return {"triton": triton.__version__, "kernel": variant.kernel.__name__.strip("_"), "case": variant.label,
            "warps": warps, **resources(variant.compiled())}  # fmt: skip


def photographs(number: int = 100, classes: int = 21) -> dict[str, Variant]:
    """Records variants for labelling and scoring `number` images of VOC's sizes, one by one, by a teacher of
    output stride 8."""
    draw = random.Random(0)
    variants: dict[str, Variant] = {}
    for _ in range(number):
        side = draw.choice([draw.randint(112, 499), 333, 375, 375, 375])
        height, width = (500, side) if draw.random() < 0.3 else (side, 500)
        with recorded("", variants):
            sums = torch.empty(1, classes, height, width)
            for scale in VIEWS:
                scaled = [int(height * scale), int(width * scale)]
                low = logits((2, classes, scaled[0] // 8 + 1, scaled[1] // 8 + 1), torch.bfloat16, True)
                softmax_accumulate(sums, low, scaled, [height, width], False, True)
            finalize(sums)
            upsample_argmax(low[:1], [height, width], False)
            mask = torch.empty(1, height, width, dtype=torch.uint8)
            confusion(mask, mask, classes, 255, True, True)
            upsample_cross_entropy(low[:1], mask, None, None, 255, True)
    return variants


def widest_grid() -> int:
    """Returns the largest second or third axis of a grid that labelling a very tall image requests; CUDA's
    limit is 65535."""
    requested = []
    low, size = logits((2, 3, 9000, 2), torch.bfloat16, True), (70000, 9)
    with launching(lambda kernel, *_, grid, **__: requested.append(grid)):
        label_calls(low, size)
        label_probability(low, torch.empty((2, *size), dtype=torch.uint8), 255)
    assert len(requested) >= 6
    return max(side for grid in requested for side in grid[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["compile", "count", "grids"])
    parser.add_argument("--classes", type=int, nargs="+", default=[21])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.what == "grids":
        print(json.dumps({"triton": triton.__version__, "widest": widest_grid()}))
        return
    if options.what == "count":
        counted = Counter(variant.kernel.__name__.strip("_") for variant in photographs().values())
        print(json.dumps({"triton": triton.__version__, **counted}))
        return
    variants = {}
    for classes in options.classes:
        variants |= {key: one for key, one in calls(classes, options.full).items() if key not in variants}
    global _all
    _all = list(variants.values())
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for found in pool.imap(_row_at, range(len(_all))):
            print(json.dumps(found), flush=True)


def _row_at(index: int) -> dict:  # kernels cannot be sent to another process; a forked process inherits them
    return row(_all[index])


if __name__ == "__main__":
    main()
