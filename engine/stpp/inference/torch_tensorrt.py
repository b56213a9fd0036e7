"""Torch-TensorRT backend, from the same exported graph: `engine.ep`.

UNVERIFIED: this module needs a CUDA build of PyTorch, and has not run on one. So nothing in its documentation
is taken for granted: a partly converted graph is an error, and the engine must agree with eager like any
other.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stpp.errors import UserError
from stpp.inference import export
from stpp.inference.record import DEFAULT_SHAPES, Shapes
from stpp.versions import version_of

FILE = "engine.ep"
SHAPES = DEFAULT_SHAPES
"""Default input sizes."""
CONVERTED = "_run_on_acc"
"""Prefix of Torch-TensorRT's names for converted parts of a graph."""


def unavailable(device: torch.device) -> str | None:
    """Reason why this backend cannot compile for `device`; None if it can."""
    if device.type != "cuda":
        return "Torch-TensorRT runs on CUDA devices only; use --backend inductor or eager"
    if importlib.util.find_spec("torch_tensorrt") is None:
        return "Torch-TensorRT is not installed; pip install stpp[torch-tensorrt]"
    return None


def versions() -> dict[str, str]:
    """Versions of packages, besides PyTorch, that the engine depends on."""
    return {name: version for name in ("torch-tensorrt", "tensorrt") if (version := version_of(name))}


def build(ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
          frozen: bool = True) -> Shapes:
    """Compiles a network into `folder`.

    Args:
        ready: from `fold.ready`, on `device` in `dtype`.
        shapes: optimisation profile.
        frozen: ignored; the weights are always part of the engine.

    Returns:
        `shapes`, without the sizes too small for the engine.

    Raises:
        UserError: the compiler failed, or did not convert the whole graph.
    """
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    exported, shapes = export.program(ready, shapes=shapes, device=device, dtype=dtype, plain=True)
    low, typical, high = ((count, 3, height, width) for count, height,
                          width in (shapes.smallest, shapes.typical, shapes.largest))
    name = next(node.name for node in exported.graph.nodes if node.op == "placeholder"
                and node.name.startswith("images"))
    images = torch_tensorrt.Input(min_shape=low, opt_shape=typical, max_shape=high, dtype=dtype, name=name)
    try:
        # Types come from the graph: with `enabled_precisions`, float32 is built without a warning.
        compiled = torch_tensorrt.dynamo.compile(
            exported, arg_inputs=[images], device=device, use_explicit_typing=True,
            require_full_compilation=True, min_block_size=1, cache_built_engines=False,
            reuse_cached_engines=False, timing_cache_path=str(folder / "timing.cache"))
    except Exception as error:  # a converter may raise anything
        raise UserError("--backend torch-tensorrt: compiling failed "
                        f"({str(error).strip().splitlines()[0][:300]}); use --backend tensorrt, inductor or "
                        "eager") from error
    if left := unconverted(compiled):
        raise UserError(f"--backend torch-tensorrt: {', '.join(left[:5])} were not converted; use "
                        "--backend tensorrt, inductor or eager")
    # `images` passes the ranges
    torch_tensorrt.save(compiled, str(folder / FILE), arg_inputs=[images], retrace=True)
    (folder / "timing.cache").unlink(missing_ok=True)
    return shapes


def unconverted(compiled: Any) -> list[str]:
    """Lists the parts of a compiled graph that PyTorch would run; a fully converted graph is one part."""
    children = dict(compiled.named_children())
    left = [name for name in children if not name.startswith(CONVERTED)]
    left += [str(node.target) for node in compiled.graph.nodes
             if node.op in ("call_function", "call_method") and "getitem" not in str(node.target)]
    return left if left or len(children) == 1 else list(children) or ["everything"]


def load(folder: Path, *, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads an engine: images of the engine's dtype to float32 logits.

    Args:
        folder: holds `engine.ep`. Native code: check it first (`stpp.inference.trust`).
    """
    torch_tensorrt = importlib.import_module("torch_tensorrt")
    program = torch_tensorrt.load(str(folder / FILE)).module()

    def run(images_NCHW: torch.Tensor) -> torch.Tensor:
        output = program(images_NCHW)
        return output[0] if isinstance(output, (list, tuple)) else output

    return run
