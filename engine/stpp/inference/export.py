"""Export of a ready network (`fold.ready`) for compilers: `torch.export` with dynamic batch and image size.

For AOTInductor on a CPU, the heads' dilated convolutions are one opaque operator, because slices with
size-dependent bounds would fix the graph to one size. Compilers for GPUs get plain convolutions.
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
"""Minimum sides of the example input: at output stride 32 a smaller one gives a map of one cell, and
specialises the graph to that."""


def program(ready: nn.Module, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
            plain: bool) -> tuple[ExportedProgram, Shapes]:
    """Exports a network with dynamic batch, height and width.

    Args:
        ready: from `fold.ready`, on `device` in `dtype`; not modified.
        shapes: input sizes; compilers tune for the typical one.
        plain: use plain convolutions instead of the opaque operator.

    Returns:
        Program from images [N, 3, H, W] of `dtype` to float32 logits [N, C, h, w]; and `shapes`, without the
        sizes too small for it.
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
        ready: from `fold.ready`, on any device; not modified.
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
        graph = torch.onnx.export(exported, dynamo=True, verbose=False, input_names=[INPUT],
                                  output_names=[OUTPUT])
    path.parent.mkdir(parents=True, exist_ok=True)
    graph.model.metadata_props.update(metadata or {})
    graph.save(str(path), external_data=False)
    return shapes


def plain_copy(network: nn.Module) -> nn.Module:
    """Copies a network with plain convolutions in place of the operators; weights are shared."""
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared)
    for module in copied.modules():
        if hasattr(module, "fused"):
            module.fused = False
    return copied


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the developer messages of PyTorch's exporters."""
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
    """Typical input with at least two images and two different sides: the exporter merges equal sizes."""
    count, height, width = shapes.typical
    height, width = max(height, LEAST_EXAMPLE_PX), max(width, LEAST_EXAMPLE_PX)
    return max(count, 2), 3, height, width + (width == height)


def _without_too_small(shapes: Shapes, exported: ExportedProgram) -> Shapes:
    """Raises sides to the lower bounds that PyTorch derived for the graph; the number of images is not
    changed.

    The exporter assumes that dynamic sizes are at least two. A batch of one image is tested by running it.
    """
    images = next(node for node in exported.graph.nodes if node.op == "placeholder"
                  and node.name.startswith("images"))
    bounds = [exported.range_constraints[side.node.expr].lower for side in images.meta["val"].shape[2:]]
    least = [max(side, int(bound)) for side, bound in zip(shapes.smallest[1:], bounds, strict=True)]
    grown = {name: (getattr(shapes, name)[0], *map(max, least, getattr(shapes, name)[1:]))
             for name in ("smallest", "typical", "largest")}
    return replace(shapes, **grown)
