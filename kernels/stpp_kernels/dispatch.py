"""Definition of operators, and choice of their implementation by device.

An operator is defined in Python, so that it exists even if nothing was compiled. Calls use, in this order of
preference, `cpp` (CPU) or `triton` (CUDA), else `reference`, the plain PyTorch form. The environment variable
STPP_KERNELS=reference forces the last one. Falling back to a slower form is logged once, as a warning of the
logger "stpp_kernels".

The C++ extension registers its kernels in the namespace `stpp_kernels_cpp`; its schemas are also defined
here.
"""

import functools
import importlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

LOG = logging.getLogger("stpp_kernels")
NAMESPACE = "stpp_kernels"
LIB = torch.library.Library(NAMESPACE, "DEF")
CPP_NAMESPACE = "stpp_kernels_cpp"
CPP_LIB = torch.library.Library(CPP_NAMESPACE, "DEF")
CPP_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

_chosen: dict[str, dict[str, str]] = {}


def define(
    name: str,
    signature: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: str | None = None,
    cpp: bool = True,
    float_arg: int | None = 0,
) -> torch._ops.OpOverload:
    """Defines `stpp_kernels::<name>` with all its implementations and returns the operator.

    Args:
        name: name of the operator, also of its C++ kernel in `stpp_kernels_cpp`.
        signature: schema without the name, `"(Tensor x, int k) -> Tensor"`.
        reference: plain PyTorch form with the schema's arguments, in order, positional.
        fake: shape and dtype form for tracing, same arguments.
        triton: `"module:function"` of the CUDA form relative to this package, imported when first called;
            same arguments.
        cpp: a C++ kernel of this name is expected.
        float_arg: position of the argument whose dtype decides if C++ and Triton are used (float64 uses
            `reference`); None if no argument decides.
    """
    LIB.define(f"{name}{signature}")
    if cpp:
        CPP_LIB.define(f"{name}{signature}")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIB)
    forced = reference_forced()
    cpp_op = getattr(getattr(torch.ops, CPP_NAMESPACE), name).default if cpp else None
    has_cpp = cpp and not forced and _has_cpp_kernel(name)
    has_triton = triton is not None and not forced and triton_available()
    LIB.impl(name, _kernel("cpu", cpp_op if has_cpp else None, reference, float_arg), "CPU")
    launch = _lazy(triton) if has_triton else None
    LIB.impl(name, _kernel("cuda", launch, reference, float_arg), "CUDA")
    _chosen[name] = {"cpu": "cpp" if has_cpp else "reference",
                     "cuda": "triton" if has_triton else "reference"}
    if cpp and not has_cpp and not forced:
        _log_fallback("the C++ operators are not built, or failed to load; on a CPU the plain PyTorch forms "
                      "run instead")
    if triton and not has_triton and not forced and torch.cuda.is_available():
        _log_fallback("Triton or a C compiler is missing; on CUDA the plain PyTorch forms run instead")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def implementations(device: str | None = None) -> dict[str, str]:
    """Maps operator names to `"cpp"`, `"triton"` or `"reference"`, their implementation on `device`.

    Args:
        device: "cpu" or "cuda"; None: CUDA if available, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: chosen[device] for name, chosen in _chosen.items()}


def describe_implementations(device: str | None = None) -> str:
    """Formats `implementations` for the log of a run."""
    return ", ".join(f"{name} {kind}" for name, kind in implementations(device).items())


def reference_forced() -> bool:
    """Checks if the environment forces the plain PyTorch forms."""
    return os.environ.get("STPP_KERNELS", "") == "reference"


def triton_available() -> bool:
    """Checks for the `triton` package (not this package's `triton` folder) and a C compiler for its
    launchers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and bool(compiler)


def set_reported(name: str, device: str, implementation: str) -> None:
    """Overrides the result of `implementations` for an operator with its own rule of choice, for example
    cuDNN."""
    _chosen[name][device] = implementation


@functools.cache
def load_extension() -> bool:
    """Loads the C++ kernels; False if there are none or they do not load, which is logged once."""
    if reference_forced():
        return False
    for library in _libraries(Path(__file__).parent, torch.backends.cpu.get_cpu_capability()):
        try:
            torch.ops.load_library(str(library))
            return True
        except OSError as error:  # built for another torch or machine
            LOG.warning("cannot load %s: %s; rebuild it with `make clean setup`", library.name, error)
    return False


def built_libraries(folder: Path) -> list[Path]:
    """Lists the libraries of C++ kernels in a folder, for whatever processor."""
    return [path for path in sorted(folder.glob("_C*.*")) if path.suffix in (".so", ".pyd")]


def _libraries(folder: Path, capability: str) -> list[Path]:
    """Libraries of the C++ kernels that this processor can run, the best one first.

    A checkout has a library for its own machine, a wheel has one for each level of x86-64 (setup.py).
    """
    built = {path.name.split(".")[0]: path for path in built_libraries(folder)}
    levels = {"AVX512": ["_C_x86_64_v4", "_C_x86_64_v3"], "AVX2": ["_C_x86_64_v3"]}.get(capability, [])
    return [built[name] for name in ("_C", *levels) if name in built]


def _has_cpp_kernel(name: str) -> bool:
    return load_extension() and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{CPP_NAMESPACE}::{name}", "CPU"
    )


def _kernel(device: str, fast: Callable | None, reference: Callable, float_arg: int | None) -> Callable:
    def run(*args):
        # Autocast is still on in a custom operator's kernel, which chooses its own dtypes.
        with torch.autocast(device, enabled=False):
            if fast is not None and (float_arg is None or args[float_arg].dtype in CPP_DTYPES):
                return fast(*args)
            return reference(*args)

    return run


def _lazy(target: str) -> Callable:
    module, function = target.split(":")

    @functools.cache
    def load() -> Callable:
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)

    return lambda *args: load()(*args)


@functools.cache
def _log_fallback(message: str) -> None:
    LOG.warning(message)
