"""Variants of the Triton kernels that real calls ask for, and their compilation for sm_90: neither needs a GPU.

A program for processes of its own, because Triton decides when a kernel is defined whether it is interpreted (as in the other
tests). `python compile_cases.py compile --classes 21 --full` prints a JSON line for each distinct variant of the calls in `calls`;
`python compile_cases.py count` prints how many variants 100 images of VOC ask for. The package `triton` is the first on PYTHONPATH.
"""

import argparse
import contextlib
import json
import multiprocessing
import random
import subprocess
import tempfile
import time
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from stpp_kernels.triton.argmax import upsample_argmax
from stpp_kernels.triton.confusion import confusion
from stpp_kernels.triton.cross_entropy import upsample_cross_entropy
from stpp_kernels.triton.softmax_accumulate import finalize, softmax_accumulate

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
ODD = (65, 97)
"""Low-resolution size whose strides and sizes divide by nothing that a compiler could use."""


@dataclass(frozen=True)
class Variant:
    """One kernel as specialised for one call."""

    kernel: JITFunction
    args: tuple
    kwargs: dict
    bound: dict
    specialization: list
    """Type and, where it is specialised, property (1, or divisible by 16) of every argument."""
    options: dict

    @classmethod
    def of(cls, kernel: JITFunction, args: tuple, kwargs: dict) -> "Variant":
        kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}  # what JITFunction.run adds
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        return cls(kernel, args, kwargs, *bind(*args, **kwargs))

    @property
    def key(self) -> str:
        """Key under which Triton keeps the compiled kernel."""
        return f"{self.kernel.__name__} {self.specialization} {self.options}"

    def compiled(self):
        options, signature, constexprs, attrs = self.kernel._pack_args(
            BACKEND, self.kwargs, self.bound, self.specialization, self.options
        )
        return triton.compile(ASTSource(self.kernel, signature, constexprs, attrs), TARGET, options.__dict__)


@contextlib.contextmanager
def recorded():
    """Yields a dictionary that collects, by key, the variants of all launches instead of running them."""
    variants: dict[str, Variant] = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        variant = Variant.of(kernel, args, kwargs)
        variants.setdefault(variant.key, variant)

    run, check = JITFunction.run, torch._assert_async
    JITFunction.run, torch._assert_async = record, lambda *_: None
    try:
        yield variants
    finally:
        JITFunction.run, torch._assert_async = run, check


def resources(compiled) -> dict[str, int]:
    """Registers a thread, and bytes of stack, local and shared memory, which the driver would see. Spills lie on the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(field.split(":") for field in found.split("Function")[1].split()[1:] if field.count(":") == 1)
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"]), "local": int(fields["LOCAL"]),
            "shared": compiled.metadata.shared}  # fmt: skip
