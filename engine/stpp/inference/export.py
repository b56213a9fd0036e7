"""A ready network (`fold.ready`) as a graph that compilers take: `torch.export` with any number and size of
images.

The dilated convolutions of the heads are one opaque operator in the graph for AOTInductor on a CPU, because
slices whose bounds depend on the size would tie the graph to one size. Compilers for GPUs get plain
convolutions, which they know.
"""

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from stpp.errors import UserError
from stpp.inference.record import Shapes

INPUT, OUTPUT = "images", "logits"
LEAST_EXAMPLE_PX = 65
"""Sides of the example: at output stride 32 a smaller one ends in a map of one cell, and the graph would be
for that alone."""


def program(ready: nn.Module, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
            plain: bool) -> tuple[ExportedProgram, Shapes]:
    """Exports a network with dynamic batch, height and width.

    Args:
        ready: from `fold.ready`, on `device` in `dtype`; left as it is.
        shapes: their typical input is what a compiler tunes for.
        plain: plain convolutions instead of the opaque operator.

    Returns:
        images [N, 3, H, W] of `dtype` -> float32 logits [N, C, h, w]; and `shapes`, without the sizes too
        small for it.
    """
    example = torch.zeros(_example_shape(shapes), dtype=dtype,
                          device=device).contiguous(memory_format=torch.channels_last)
    side = Dim.DYNAMIC(min=ready.least_px)
    every_size = {0: Dim.DYNAMIC, 2: side, 3: side}
    with quiet(), torch.no_grad():
        exported = torch.export.export(plain_copy(ready) if plain else ready, (example,),
                                       dynamic_shapes=(every_size,))
    return exported, _without_too_small(shapes, exported)


def onnx(ready: nn.Module, path: Path, *, shapes: Shapes, dtype: torch.dtype,
         metadata: Mapping[str, str] | None = None) -> Shapes:
    """Writes a network as ONNX with an input `images` of `dtype` and an output `logits` in float32.

    Args:
        ready: from `fold.ready`, on any device; left as it is.
        metadata: entries of the model's `metadata_props`.

    Returns:
        `shapes`, without the sizes too small for the graph.

    Raises:
        UserError: a package is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}, which is not installed; pip install "
                        "stpp[tensorrt]")
    exported, shapes = program(ready, shapes=shapes, device=next(ready.parameters()).device, dtype=dtype,
                               plain=True)
    with quiet(), torch.no_grad():
        made = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=[INPUT],
                                 output_names=[OUTPUT])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.model.metadata_props.update(metadata or {})
    made.save(str(path), external_data=False)
    return shapes


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy with plain convolutions in place of the operators; it shares its weights with `network`."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    for module in copied.modules():
        if hasattr(module, "fused"):
            module.fused = False
    return copied


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps back what PyTorch's exporters say to their own developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _example_shape(shapes: Shapes) -> tuple[int, int, int, int]:
    """The typical input, with two images at least and two different sides: equal numbers would be taken for
    one."""
    count, height, width = shapes.typical
    height, width = max(height, LEAST_EXAMPLE_PX), max(width, LEAST_EXAMPLE_PX)
    return max(count, 2), 3, height, width + (width == height)


def _without_too_small(shapes: Shapes, exported: ExportedProgram) -> Shapes:
    """Sides below the bound under which PyTorch proved the graph right are left out; one image is always
    taken.

    The exporter assumes at least two of everything that is not fixed at one. For images this is checked by
    running one.
    """
    images = next(node for node in exported.graph.nodes if node.op == "placeholder"
                  and node.name.startswith("images"))
    bounds = [exported.range_constraints[side.node.expr].lower for side in images.meta["val"].shape[2:]]
    least = [max(side, int(bound)) for side, bound in zip(shapes.smallest[1:], bounds, strict=True)]
    grown = {name: (getattr(shapes, name)[0], *map(max, least, getattr(shapes, name)[1:]))
             for name in ("smallest", "typical", "largest")}
    return replace(shapes, **grown)
