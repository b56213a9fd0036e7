"""Predictors compiled by TensorRT 11, or by TensorRT for RTX where that is what is installed: `engine.plan`
and `engine.onnx`.

The ONNX graph carries its types (images, weights and maps in the predictor's precision, logits in float32),
and the network is strongly typed: TensorRT computes in those. Both packages have the same interface; the one
for RTX knows GeForce and workstation GPUs only, builds without a GPU, and has no timing cache (it tunes when
an engine is loaded).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from stpp import files
from stpp.errors import UserError
from stpp.inference import export, trust
from stpp.inference.record import DEFAULT_SHAPES, Shapes
from stpp.inference.tensorrt_run import Runner

FILE, ONNX = "engine.plan", "engine.onnx"
SHAPES = DEFAULT_SHAPES
"""Taken where nothing else is asked for."""
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Name on PyPI -> module; the first that is installed is used."""


def installed() -> tuple[str, ModuleType] | None:
    """Name and module of the TensorRT that is used; None where there is none."""
    for name, module in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            try:
                return name, importlib.import_module(module)
            except ImportError:  # the bindings are there, the libraries are not
                continue
    return None


def unavailable(device: torch.device) -> str | None:
    """What is missing to compile for `device`; None where nothing is."""
    if device.type != "cuda":
        return "TensorRT runs on CUDA devices only; use --backend inductor or eager"
    if installed() is None:
        return "TensorRT is not installed; pip install stpp[tensorrt] (datacenter GPUs) or stpp[tensorrt-rtx]"
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; pip install stpp[tensorrt]" if missing else None


def versions() -> dict[str, str]:
    """Versions, beside PyTorch's, that the engine depends on."""
    found = installed()
    return {found[0]: found[1].__version__} if found else {}


def build(ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
          frozen: bool = True) -> Shapes:
    """Compiles a network into `folder`; the ONNX graph stays beside the engine.

    Args:
        ready: from `fold.ready`, in `dtype`.
        shapes: the optimisation profile.
        device: where the engine will run.
        frozen: the weights are always part of the engine.

    Returns:
        `shapes`, without the sizes too small for the engine.

    Raises:
        UserError: a package is missing, or TensorRT refuses the graph.
    """
    shapes = export.onnx(ready, folder / ONNX, shapes=shapes, dtype=dtype)
    compile_onnx(folder / ONNX, folder / FILE, shapes=shapes, device=device)
    return shapes


def compile_onnx(graph: Path, plan: Path, *, shapes: Shapes, device: torch.device,
                 capabilities: Sequence[str] = ()) -> None:
    """Compiles an ONNX file that `export.onnx` wrote to a serialised engine.

    Args:
        shapes: the optimisation profile; what `export.onnx` returned.
        device: where the engine will run; with `capabilities` it need not exist.
        capabilities: names such as "SM89" to build for instead of the GPU that is here (TensorRT for RTX).

    Raises:
        UserError: TensorRT is missing, or refuses the graph.
    """
    found = installed()
    if found is None:
        raise UserError(f"--backend tensorrt: {unavailable(torch.device('cuda'))}")
    name, trt = found
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = parse(trt, builder, graph, logger)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape(export.INPUT, *((count, 3, height, width) for count, height, width in (
        shapes.smallest, shapes.typical, shapes.largest)))
    config.add_optimization_profile(profile)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), i)
    cache = None if name == "tensorrt-rtx" else _timing_cache(config, trt, device)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise UserError(f"--backend tensorrt: {name} {trt.__version__} could not build the engine "
                        f"({logger.last}); use --backend inductor or eager")
    with files.plain(plan) as file:
        file.write(made)
    if cache is not None:
        with files.atomic(cache) as file:
            file.write(bytes(config.get_timing_cache().serialize()))


def parse(trt: ModuleType, builder: Any, path: Path, logger: Any) -> Any:
    """The strongly typed TensorRT network of an ONNX file.

    Raises:
        UserError: TensorRT does not know something in it.
    """
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(str(parser.get_error(i)).strip() for i in range(parser.num_errors))
        raise UserError(f"--backend tensorrt: the graph was not understood ({errors[:300]}); use --backend "
                        "inductor or eager")
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    names += [network.get_output(i).name for i in range(network.num_outputs)]
    if names != [export.INPUT, export.OUTPUT]:  # an empty file is a valid graph
        raise UserError(f"--backend tensorrt: {path} has {names or 'neither input nor output'}, expected "
                        f"{export.INPUT} and {export.OUTPUT}; compile it again")
    return network


def load(folder: Path, *, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads an engine: images of the engine's type -> float32 logits, on the current CUDA stream.

    Args:
        folder: holds `engine.plan`. Native code: check it first (`stpp.inference.trust`).

    Raises:
        UserError: TensorRT does not accept it here.
    """
    name, trt = installed()
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((folder / FILE).read_bytes())
    if engine is None:
        raise UserError(f"{folder}: {name} {trt.__version__} does not load the engine ({logger.last}); "
                        "delete the folder to compile it again")
    return Runner(trt, engine, device=device, keep=(runtime, logger), captures=name != "tensorrt-rtx")


def _logger(trt: ModuleType) -> Any:
    """Keeps the last error, for our own message, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:300]

    return Logger()


def _timing_cache(config: Any, trt: ModuleType, device: torch.device) -> Path:
    """Gives `config` what earlier builds measured on this kind of GPU; returns the file to keep it in."""
    kind = "".join(char if char.isalnum() else "-" for char in torch.cuda.get_device_name(device))
    path = trust.cache_folder() / f"tensorrt-{trt.__version__}-{kind}.timing"
    known = path.read_bytes() if path.exists() and _is_mine(path) else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return path


def _is_mine(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
