"""AOTInductor backend, for CPU and CUDA: `engine.pt2`, a native library and the weights.

An unfrozen package accepts other weights of the same architecture, so one compile serves all predictors of a
run. A frozen one has the weights compiled in: faster, for one predictor only. It would accept other weights
too, and be silently wrong; so would an unfrozen one compiled without `KEEP_CONSTANTS`, because PyTorch
inlines vectors of up to eight numbers (the classifier's bias).
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stpp_kernels  # noqa: F401  (packages call its operators by name)
from stpp.device import has_cpp_compiler
from stpp.errors import UserError
from stpp.inference import export
from stpp.inference.record import ANY_SIZE, Shapes
from stpp_kernels.dilated_conv import FORM_VARIABLE

FILE = "engine.pt2"
SHAPES = ANY_SIZE
"""Default input sizes."""
KEEP_CONSTANTS = {"always_keep_tensor_constants": True}
OPTIONS = {"cpp.dynamic_threads": True}
"""Compiler options: the number of threads is read at every call, not compiled in."""


def unavailable(device: torch.device) -> str | None:
    """Reason why this backend cannot compile for `device`; None if it can."""
    if not has_cpp_compiler():
        return "AOTInductor needs a C++ compiler; install g++"
    return None


def versions() -> dict[str, str]:
    """Versions of packages, besides PyTorch, that the engine depends on."""
    return {}


def build(ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
          frozen: bool) -> Shapes:
    """Compiles a network into `folder`.

    Args:
        ready: from `fold.ready`, on `device` in `dtype`.
        frozen: packs the weights into the code.

    Returns:
        `shapes`, without the sizes too small for the engine.

    Raises:
        UserError: the compiler failed.
    """
    taps = device.type == "cpu" or os.environ.get(FORM_VARIABLE) == "taps"
    exported, shapes = export.program(ready, shapes=shapes, device=device, dtype=dtype, plain=not taps)
    options = {"freezing": frozen, **OPTIONS, **({} if frozen else KEEP_CONSTANTS)}
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # slow imports, needed for compiling only
    from torch._inductor.utils import fresh_inductor_cache

    # it compiles test programs, which the user's own cache keeps across processes
    pick_vec_isa()
    try:
        # A temporary cache: AOTInductor leaves a second copy of the weights in it.
        with fresh_inductor_cache(), export.quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / FILE),
                                                     inductor_configs=options)
    except Exception as error:  # a compiler on another machine may raise anything
        raise UserError(f"--backend inductor: AOTInductor failed ({_line(error)}); use --backend "
                        "eager") from error
    return shapes


def load(folder: Path, *, device: torch.device,
         swapped: nn.Module | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads an engine: channels_last images of the engine's dtype to float32 logits.

    Args:
        folder: holds `engine.pt2`. Native code: check it first (`stpp.inference.trust`).
        swapped: from `fold.ready`, on `device`; its weights replace the engine's own, which must not be
            frozen.

    Raises:
        ValueError: `swapped` has another architecture, or the engine has weights compiled in.
    """
    index = (device.index or 0) if device.type == "cuda" else -1
    model = torch._inductor.aoti_load_package(str(folder / FILE), device_index=index)
    if swapped is not None:
        # Non-persistent buffers are constants of the package too.
        tensors = (*swapped.named_parameters(), *swapped.named_buffers())
        weights = {name: value.detach() for name, value in tensors}
        in_engine, in_network = set(model.get_constant_fqns()), set(weights)
        if in_engine != in_network:
            raise ValueError(f"engine and network differ in {sorted(in_engine ^ in_network)[:5]}: another "
                             "architecture, or weights compiled in")
        model.load_constants(weights, check_full_update=True)
    return model


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()),
                lines[0] if lines else type(error).__name__)[:300]
