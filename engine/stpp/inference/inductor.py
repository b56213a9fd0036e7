"""Predictors compiled by AOTInductor, for CPU and CUDA: `engine.pt2`, one native library and the weights.

An unfrozen package takes other weights of the same architecture in place of its own, so one compile serves
all predictors of a run. A frozen one has them packed into the code: faster, for one predictor only. It would
accept other weights too, and be silently wrong; so would an unfrozen one that was compiled without
`KEEP_CONSTANTS`, because PyTorch writes vectors of up to eight numbers (the classifier's bias) into the code.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stpp_kernels  # noqa: F401  (packages call its operators by name)
from stpp.errors import UserError
from stpp.inference import export
from stpp.inference.record import ANY_SIZE, Shapes
from stpp_kernels.dilated_conv import FORM_VARIABLE

FILE = "engine.pt2"
SHAPES = ANY_SIZE
"""Taken where nothing else is asked for."""
KEEP_CONSTANTS = {"always_keep_tensor_constants": True}
OPTIONS = {"cpp.dynamic_threads": True}
"""The number of threads is asked for at every call, not written into the code."""


def unavailable(device: torch.device) -> str | None:
    """What is missing to compile for `device`; None where nothing is."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")):
        return "AOTInductor needs a C++ compiler; install g++"
    return None


def versions() -> dict[str, str]:
    """Versions, beside PyTorch's, that the engine depends on."""
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
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # imports of seconds, which only compiling needs
    from torch._inductor.utils import fresh_inductor_cache

    # it compiles trial programs, which the user's own cache keeps from one process to the next
    pick_vec_isa()
    try:
        # A cache of its own, deleted afterwards: AOTInductor leaves a second copy of the weights there each
        # time.
        with fresh_inductor_cache(), export.quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / FILE),
                                                     inductor_configs=options)
    except Exception as error:  # whatever a compiler of another machine may raise
        raise UserError(f"--backend inductor: AOTInductor failed ({_line(error)}); use --backend "
                        "eager") from error
    return shapes


def load(folder: Path, *, device: torch.device,
         swapped: nn.Module | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads an engine: images of the engine's type, channels_last -> float32 logits.

    Args:
        folder: holds `engine.pt2`. Native code: check it first (`stpp.inference.trust`).
        swapped: from `fold.ready`, on `device`: its weights take the place of the engine's own, which must
            not be frozen.

    Raises:
        ValueError: `swapped` is of another architecture, or the engine has weights in its code.
    """
    index = (device.index or 0) if device.type == "cuda" else -1
    model = torch._inductor.aoti_load_package(str(folder / FILE), device_index=index)
    if swapped is not None:
        # Buffers that no state dict has are constants of the package too.
        tensors = (*swapped.named_parameters(), *swapped.named_buffers())
        weights = {name: value.detach() for name, value in tensors}
        ours, theirs = set(model.get_constant_fqns()), set(weights)
        if ours != theirs:
            raise ValueError(f"engine and network differ in {sorted(ours ^ theirs)[:5]}: another "
                             "architecture, or weights in the code")
        model.load_constants(weights, check_full_update=True)
    return model


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()),
                lines[0] if lines else type(error).__name__)[:300]
