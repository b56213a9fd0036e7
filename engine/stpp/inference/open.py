"""Opens and makes predictors: `open_predictor` for whoever labels, `compile_predictor` for `stpp compile`.

Both are given the function that reads a checkpoint (`stpp.models.trained.load_network`): predictors know no
architectures.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from stpp import log
from stpp.errors import UserError
from stpp.inference import build, choose, exif_rule, gate, views
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
"""A checkpoint's network, class names and architecture."""


def compile_predictor(checkpoint: Path, out: Path, *, load: Load, device: torch.device, backend: str = "auto",
                    precision: str = "auto", shapes: Shapes | None = None,
                    sample: Iterable[torch.Tensor] | None = None) -> Predictor:
    """Makes an engine folder of a checkpoint.

    Args:
        checkpoint: what `load` reads.
        out: the folder; an engine that is there is replaced.
        load: see the top of this file.
        device: where the engine will run.
        backend: "eager" or a key of `BACKENDS`; "auto" takes the fastest that is present, whatever it takes
            to compile.
        precision: "auto", "bf16", "fp16" or "fp32".
        shapes: inputs to be taken; None: the backend's own range (any, for inductor).
        sample: batches of normalised images to compare with eager on; None leaves that to the first images of
            the work.

    Raises:
        UserError: a backend is missing or fails, the engine disagrees with eager, or `out` is something else.
    """
    if out.exists() and not (out / records.NAME).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and is no engine; choose another folder")
    if backend == "auto":
        found = build.present(device)
        backend = choose.fastest(found, device.type)
        log.say(f"backend {backend}: the fastest of {', '.join([*found, 'eager'])} on {device.type}")
    plan = _plan(checkpoint, load, device, backend=backend, precision=precision, shapes=shapes)
    plan = dataclasses.replace(plan, exif=exif_rule.told(checkpoint))
    if backend == "eager":
        build.eager_folder(plan, out)
        return plan.eager()
    view_px = plan.architecture.get("view_px")
    return build.build(plan, out, sample and (views.seen(images, view_px) for images in sample))


def open_predictor(path: Path, *, load: Load, device: torch.device, backend: str = "auto",
                   precision: str = "auto",
                 images: int | None = None, work: Work | None = None, cache: Path | None = None,
                   trust: bool = False) -> Predictor:
    """The predictor in an engine folder or a checkpoint, ready to label; says in a line what it is and why.

    `identity` of what is returned tells what its labels depend on.

    An engine is compared with eager on the first images it is given, and refused if it disagrees. One that
    was built for another device or by other versions, or whose weights or files were changed, is never run:
    it is compiled again into `cache`.

    Args:
        path: a folder that `compile_predictor` wrote, or a best.pt.
        load: see the top of this file.
        device: where to compute.
        backend: for a checkpoint: "eager" or a key of `BACKENDS`; "auto" chooses by the amount of work.
        precision: for a checkpoint: "auto", "bf16", "fp16" or "fp32".
        images: how many will be labelled, one view each; short for `work`.
        work: what will be labelled: the same on all ranks and when a run goes on, because `auto` chooses by
            it.
        cache: folder of engines compiled on the way; None: the user's own.
        trust: run an engine folder that this user did not build.

    Raises:
        UserError: see `compile_predictor`; or the engine was built by somebody else.
    """
    path, cache = Path(path), Path(cache) if cache is not None else default_cache()
    if path.is_dir():
        return _open_folder(path, load, device, backend=backend, precision=precision, cache=cache,
                            trusted=trust)
    chosen, why = backend, "as asked"
    plan = _plan(path, load, device, backend="eager" if backend == "auto" else backend, precision=precision)
    work = work or Work(images=images)
    machine = {"kind": device.type, "precision": plan.precision, "cores": torch.get_num_threads()}
    if backend == "auto":
        chosen, frozen, why = choose.pick(plan.network, work, present=build.present(device), **machine)
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
    """Where engines compiled on the way are kept: in the user's own cache."""
    return trusting.cache_folder() / "engines"


def _open_folder(folder: Path, load: Load, device: torch.device, *, backend: str, precision: str, cache: Path,
                 trusted: bool) -> Predictor:
    record, signature = records.read(folder)
    for flag, asked in (("backend", backend), ("precision", precision)):
        found = getattr(record, flag)
        if asked not in ("auto", found):
            raise UserError(f"--{flag} {asked}: {folder} is an engine with {flag} {found}; leave the flag "
                            "out, or give a checkpoint")
    if record.backend != "eager" and record.device.kind != device.type:
        raise UserError(f"{folder} was built for {record.device.kind} ({record.device.name}), and this is "
                        f"{device.type}; give its {records.WEIGHTS}")
    weights = folder / records.WEIGHTS
    if not weights.is_file():
        raise UserError(f"{folder} has no {records.WEIGHTS}, from which to check its engine; compile it "
                        "again")
    plan = _plan(weights, load, device, backend=record.backend, precision=record.precision,
                 shapes=record.shapes)
    if record.backend == "eager":
        return plan.eager()
    _, reason = build.unfit(folder, plan, trusted=True)
    if reason is not None:
        log.say(f"engine {folder} is not used: {reason}; the predictor is compiled from its {weights.name}")
        return _ready(plan, lambda: build.cached(plan, cache))
    if not (trusted or trusting.is_own(record, signature)):
        raise UserError(f"{folder}: you did not build this engine on this machine, and an engine is a "
                        f"program; give its {weights.name} to compile your own, or --trust-engine if you "
                        "trust its origin")
    return _ready(plan, lambda: build.load(folder, record, plan))


def _ready(plan: Compilation, make: Callable[[], CompiledPredictor]) -> Predictor:
    """Eager, or an engine behind its gate."""
    if plan.backend == "eager":
        return plan.eager()
    engine = make()
    return gate.Gated(engine, lambda: plan.eager("fp32").logits, name=engine.record.describe())


def _cached_or_eager(plan: Compilation, cache: Path) -> Predictor:
    """Where `auto` chose, a compiler that fails is no reason to stop."""
    try:
        return _ready(plan, lambda: build.cached(plan, cache))
    except UserError as error:
        log.say(f"{error}; eager is used")
        return plan.eager()


def _plan(path: Path, load: Load, device: torch.device, *, backend: str, precision: str,
          shapes: Shapes | None = None) -> Compilation:
    """The predictor of a checkpoint, to be compiled with its weights fixed."""
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
