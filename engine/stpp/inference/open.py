"""Opens and compiles predictors: `open_predictor` for labelling, `compile_predictor` for `stpp compile`.

Both take the function that loads a checkpoint (`stpp.models.trained.load_network`): predictors do not depend
on architectures.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from stpp import log
from stpp.errors import UserError
from stpp.inference import build, choose, exif_rule, fused, gate, views
from stpp.inference import record as records
from stpp.inference import trust as trusting
from stpp.inference.build import BACKENDS, PRECISIONS, Compilation
from stpp.inference.choose import Work
from stpp.inference.protocol import CompiledPredictor, EagerPredictor, Identity, Predictor
from stpp.inference.record import Shapes
from stpp.precision import autocast_dtype

__all__ = ["CompiledPredictor", "EagerPredictor", "Identity", "Load", "Shapes", "Predictor", "Work",
           "compile_predictor", "open_predictor"]

Load = Callable[[Path], tuple[nn.Module, list[str], dict]]
"""Function from a checkpoint to its network, class names and architecture."""


def compile_predictor(checkpoint: Path, out: Path, *, load: Load, device: torch.device,
                      backend: str = "auto", precision: str = "auto", shapes: Shapes | None = None,
                      sample: Iterable[torch.Tensor] | None = None) -> Predictor:
    """Compiles a checkpoint to an engine folder.

    Args:
        checkpoint: file that `load` reads.
        out: engine folder; an existing engine is replaced.
        load: see the top of this file.
        device: device of the engine.
        backend: "eager" or a key of `BACKENDS`; "auto": the fastest available, ignoring compile time.
        precision: "auto", "bf16", "fp16" or "fp32".
        shapes: range of inputs; None: the backend's default (any, for inductor).
        sample: batches of normalised images for the comparison with eager; None: it is made on the first
            images in use.

    Raises:
        UserError: a backend is missing or fails, the engine disagrees with eager, or `out` is no engine.
    """
    if out.exists() and not (out / records.NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is no engine; choose another folder")
    if backend == "auto":
        available = build.available(device)
        backend = choose.fastest(available, device.type)
        log.say(f"backend {backend}: the fastest of {', '.join([*available, 'eager'])} on {device.type}")
    plan = _plan(checkpoint, load, device, backend=backend, precision=precision, shapes=shapes)
    plan = dataclasses.replace(plan, exif=exif_rule.recorded(checkpoint))
    if backend == "eager":
        build.write_eager_folder(plan, out)
        return plan.eager()
    view_px = plan.architecture.get("view_px")
    return build.build(plan, out, sample and (views.resize_to_view(images, view_px) for images in sample))


def open_predictor(path: Path, *, load: Load, device: torch.device, backend: str = "auto",
                   precision: str = "auto", images: int | None = None, work: Work | None = None,
                   cache: Path | None = None, trust: bool = False) -> Predictor:
    """Opens the predictor in an engine folder or a checkpoint; logs the backend and the reason.

    The `identity` of the predictor names everything that its labels depend on.

    An engine is compared with eager on its first images, and rejected if it disagrees. An engine for another
    device, of other versions, or with changed weights or files is never run: it is compiled again into
    `cache`.

    Args:
        path: engine folder of `compile_predictor`, or a checkpoint.
        load: see the top of this file.
        device: device to compute on.
        backend: for a checkpoint: "eager" or a key of `BACKENDS`; "auto" chooses by the amount of work.
        precision: for a checkpoint: "auto", "bf16", "fp16" or "fp32".
        images: number of images, one view each; short for `work`.
        work: amount of work, by which `auto` chooses; must be the same on all ranks and after a resume.
        cache: folder of engines compiled here; None: in the user's cache.
        trust: run an engine folder that this user did not build.

    Raises:
        UserError: see `compile_predictor`; or another user built the engine.
    """
    path, cache = Path(path), Path(cache) if cache is not None else default_cache()
    if path.is_dir():
        return _open_folder(path, load, device, backend=backend, precision=precision, cache=cache,
                            trusted=trust)
    chosen, why = backend, "as requested"
    plan = _plan(path, load, device, backend="eager" if backend == "auto" else backend, precision=precision)
    work = work or Work(images=images)
    machine = {"kind": device.type, "precision": plan.precision, "cores": torch.get_num_threads()}
    if backend == "auto":
        chosen, frozen, why = choose.pick(plan.network, work, present=build.available(device), **machine)
        plan = dataclasses.replace(plan, backend=chosen, frozen=frozen, shapes=_range_of(chosen))
    elif backend != "eager":
        plan = dataclasses.replace(plan, frozen=choose.is_frozen(backend, plan.network, work, **machine))
    log.say(f"predictor {path}: {chosen} {plan.precision} ({why})")
    return (
        _cached_or_eager(plan, cache)
        if backend == "auto"
        else _ready(plan, lambda: build.cached(plan, cache))
    )


def default_cache() -> Path:
    """Folder of engines compiled by `open_predictor`, in the user's cache."""
    return trusting.cache_folder() / "engines"


def _open_folder(folder: Path, load: Load, device: torch.device, *, backend: str, precision: str, cache: Path,
                 trusted: bool) -> Predictor:
    record, signature = records.read(folder)
    for flag, requested in (("backend", backend), ("precision", precision)):
        actual = getattr(record, flag)
        if requested not in ("auto", actual):
            raise UserError(f"--{flag} {requested}: {folder} is an engine with {flag} {actual}; leave the "
                            "flag out, or give a checkpoint")
    if record.backend != "eager" and record.device.kind != device.type:
        raise UserError(f"{folder} was built for {record.device.kind} ({record.device.name}), and this "
                        f"machine uses {device.type}; give its {records.WEIGHTS}")
    weights = folder / records.WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {records.WEIGHTS}, which is needed to check its engine; compile it "
                        "again")
    plan = _plan(weights, load, device, backend=record.backend, precision=record.precision,
                 shapes=record.shapes)
    if record.backend == "eager":
        if plan.weights != record.weights_sha256:
            raise UserError(f"{weights}: holds other weights than {folder / records.NAME} names; compile it "
                            "again")
        return _eager(plan)
    _, reason = build.check(folder, plan, trusted=True)
    if reason is not None:
        log.say(f"engine {folder} is not used: {reason}; compiling the predictor from its {weights.name}")
        return _ready(plan, lambda: build.cached(plan, cache))
    if not (trusted or trusting.is_own(record, signature)):
        raise UserError(f"{folder}: engines contain native code, and you did not build this one on this "
                        f"machine; give its {weights.name} to compile your own, or --trust-engine if you "
                        "trust its origin")
    return _ready(plan, lambda: build.load(folder, record, plan))


def _ready(plan: Compilation, make: Callable[[], CompiledPredictor]) -> Predictor:
    """Makes the eager predictor, or an engine with its accuracy gate."""
    if plan.backend == "eager":
        return _eager(plan)
    engine = make()
    return gate.Gated(engine, plan.references, name=engine.record.describe())


def _eager(plan: Compilation) -> Predictor:
    """Makes the eager predictor; if fused convolutions are requested, it has them, and the accuracy gate."""
    if not fused.requested(plan.device):
        return plan.eager()
    return gate.Gated(plan.eager(fuse=True), plan.references, name=f"eager-fused {plan.precision}")


def _cached_or_eager(plan: Compilation, cache: Path) -> Predictor:
    """Opens a cached engine; if the compiler chosen by `auto` fails, falls back to eager."""
    try:
        return _ready(plan, lambda: build.cached(plan, cache))
    except UserError as error:
        log.say(f"{error}; falling back to eager")
        return _eager(plan)


def _plan(path: Path, load: Load, device: torch.device, *, backend: str, precision: str,
          shapes: Shapes | None = None) -> Compilation:
    """Plans the compilation of a checkpoint, with frozen weights."""
    if backend != "eager" and backend not in BACKENDS:
        raise UserError(f"--backend {backend}: choose one of auto, eager, {', '.join(BACKENDS)}")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs CUDA; use bf16 or fp32 on a CPU")
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    network, classes, architecture = load(path)
    return Compilation(network=network, architecture=architecture, classes=tuple(classes),
                       weights=records.weights_sha256(network.state_dict()), backend=backend, frozen=True,
                       precision=names[autocast_dtype(precision, device)], device=device,
                       shapes=shapes or _range_of(backend))


def _range_of(backend: str) -> Shapes:
    return BACKENDS[backend].SHAPES if backend in BACKENDS else records.ANY_SIZE
