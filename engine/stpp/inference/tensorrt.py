"""TensorRT backend: TensorRT 11, or TensorRT for RTX if only that is installed; `engine.plan` and
`engine.onnx`.

The ONNX graph fixes the types (images, weights and maps in the predictor's precision, logits in float32), and
the network is strongly typed, so TensorRT computes in these. Both packages have the same interface; TensorRT
for RTX supports GeForce and workstation GPUs only, builds without a GPU, and has no timing cache (it tunes
when an engine is loaded).
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
"""Default input sizes."""
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""PyPI name to module; the first installed one is used."""


def installed() -> tuple[str, ModuleType] | None:
    """Name and module of the installed TensorRT; None if there is none."""
    for name, module in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            try:
                return name, importlib.import_module(module)
            except ImportError:  # bindings without the libraries
                continue
    return None


def unavailable(device: torch.device) -> str | None:
    """Reason why this backend cannot compile for `device`; None if it can."""
    if device.type != "cuda":
        return "TensorRT runs on CUDA devices only; use --backend inductor or eager"
    if installed() is None:
        return "TensorRT is not installed; pip install stpp[tensorrt] (datacenter GPUs) or stpp[tensorrt-rtx]"
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed; pip install stpp[tensorrt]" if missing else None


def versions() -> dict[str, str]:
    """Versions of packages, besides PyTorch, that the engine depends on."""
    package = installed()
    return {package[0]: package[1].__version__} if package else {}


def build(ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device, dtype: torch.dtype,
          frozen: bool = True) -> Shapes:
    """Compiles a network into `folder`, with the engine and its ONNX graph.

    Args:
        ready: from `fold.ready`, in `dtype`.
        shapes: optimisation profile.
        device: device of the engine.
        frozen: ignored; the weights are always part of the engine.

    Returns:
        `shapes`, without the sizes too small for the engine.

    Raises:
        UserError: a package is missing, or TensorRT rejects the graph.
    """
    shapes = export.onnx(ready, folder / ONNX, shapes=shapes, dtype=dtype)
    compile_onnx(folder / ONNX, folder / FILE, shapes=shapes, device=device)
    return shapes


def compile_onnx(graph: Path, plan: Path, *, shapes: Shapes, device: torch.device,
                 capabilities: Sequence[str] = ()) -> None:
    """Compiles an ONNX file of `export.onnx` to a serialised engine.

    Args:
        shapes: optimisation profile, as returned by `export.onnx`.
        device: device of the engine; with `capabilities` it need not exist.
        capabilities: compute capabilities to build for instead of this machine's GPU, for example "SM89"
            (TensorRT for RTX).

    Raises:
        UserError: TensorRT is missing, or rejects the graph.
    """
    package = installed()
    if package is None:
        raise UserError(f"--backend tensorrt: {unavailable(torch.device('cuda'))}")
    name, trt = package
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
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise UserError(f"--backend tensorrt: {name} {trt.__version__} could not build the engine "
                        f"({logger.last}); use --backend inductor or eager")
    with files.plain(plan) as file:
        file.write(serialized)
    if cache is not None:
        with files.atomic(cache) as file:
            file.write(bytes(config.get_timing_cache().serialize()))


def parse(trt: ModuleType, builder: Any, path: Path, logger: Any) -> Any:
    """Parses an ONNX file to a strongly typed TensorRT network.

    Raises:
        UserError: TensorRT does not support the graph.
    """
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(str(parser.get_error(i)).strip() for i in range(parser.num_errors))
        raise UserError(f"--backend tensorrt: cannot parse the graph ({errors[:300]}); use --backend "
                        "inductor or eager")
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    names += [network.get_output(i).name for i in range(network.num_outputs)]
    if names != [export.INPUT, export.OUTPUT]:  # an empty file is a valid graph
        raise UserError(f"--backend tensorrt: {path} has {names or 'neither input nor output'}, expected "
                        f"{export.INPUT} and {export.OUTPUT}; compile it again")
    return network


def load(folder: Path, *, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads an engine: images of the engine's dtype to float32 logits, on the current CUDA stream.

    Args:
        folder: holds `engine.plan`. Native code: check it first (`stpp.inference.trust`).

    Raises:
        UserError: TensorRT rejects the engine on this machine.
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
    """Makes a logger that keeps the last error, for error messages, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.last = "no reason given"

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = " ".join(message.split())[:300]

    return Logger()


def _timing_cache(config: Any, trt: ModuleType, device: torch.device) -> Path:
    """Loads the timing cache of this GPU model into `config`; returns the path of its file."""
    kind = "".join(char if char.isalnum() else "-" for char in torch.cuda.get_device_name(device))
    path = trust.cache_folder() / f"tensorrt-{trt.__version__}-{kind}.timing"
    known = path.read_bytes() if path.exists() and _is_own(path) else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return path


def _is_own(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
