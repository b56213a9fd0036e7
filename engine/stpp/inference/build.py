"""Builds engine folders, and reuses cached ones.

An engine folder holds `engine.json`, the engine's files, and `checkpoint.pt`: the network, from which the
engine can be rebuilt anywhere, and with which it is compared.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from stpp import checkpoint as checkpoints
from stpp import files, log
from stpp.errors import UserError
from stpp.inference import fold, gate, inductor, tensorrt, torch_tensorrt, trust
from stpp.inference import record as records
from stpp.inference.protocol import Backend, CompiledPredictor, EagerPredictor, Identity, Run
from stpp.inference.record import Device, EngineRecord, Shapes

BACKENDS: dict[str, Backend] = {"tensorrt": tensorrt, "torch-tensorrt": torch_tensorrt, "inductor": inductor}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
"""Maximum difference from eager in the same dtype, relative to eager's largest logit; wrong weights differ by
0.2 or more."""


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Network to compile, and compiler options."""

    network: nn.Module
    architecture: dict
    classes: tuple[str, ...]
    weights: str
    """See `stpp.inference.record.weights_sha256`."""
    backend: str
    """Key of `BACKENDS`, or "eager"."""
    frozen: bool
    """Permission to compile the weights into the code."""
    precision: str
    """Key of `PRECISIONS`."""
    device: torch.device
    shapes: Shapes
    exif: bool | None = None
    """EXIF rule of the network's training, for the folder's checkpoint; see `stpp.inference.exif_rule`."""

    def versions(self) -> dict[str, str]:
        """Versions of all packages that the engine depends on."""
        return records.versions_of(**(BACKENDS[self.backend].versions() if self.backend in BACKENDS else {}))

    def key(self) -> str:
        """Cache key of the engine: equal for predictors that can share it."""
        facts = {"architecture": self.architecture, "classes": len(self.classes), "frozen": self.frozen,
                 "shapes": dataclasses.asdict(self.shapes),
                 "device": dataclasses.asdict(Device.of(self.device)),
                 "versions": self.versions(), "weights": self.frozen and self.weights}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{self.backend}-{self.precision}-{digest[:16]}"

    def eager(self, precision: str | None = None, *, fuse: bool = False) -> EagerPredictor:
        """Makes the eager predictor, in the engine's precision or another, on request with fused
        convolutions."""
        precision, backend = precision or self.precision, "eager-fused" if fuse else "eager"
        return EagerPredictor(self.network, num_classes=len(self.classes), device=self.device,
                              dtype=PRECISIONS[precision], view_px=self.architecture.get("view_px"),
                              identity=dataclasses.replace(self.identity(), backend=backend,
                                                           precision=precision), fuse=fuse)

    def references(self) -> list[gate.Logits]:
        """Makes the eager networks that an engine is judged by: in float32 and, if that is another, in its
        own precision."""
        return [self.eager(precision).logits for precision in dict.fromkeys(("fp32", self.precision))]

    def identity(self) -> Identity:
        """Identity of the resulting predictor."""
        fixed = "-frozen" if self.frozen and self.backend != "eager" else ""
        return Identity(weights_sha256=self.weights, classes=self.classes, backend=self.backend + fixed,
                        precision=self.precision, output_stride=self.architecture.get("output_stride"),
                        view_px=self.architecture.get("view_px"))

    def ready(self) -> nn.Module:
        """Folds the network (`fold.ready`), on the device, in the engine's precision."""
        return fold.ready(self.network, device=self.device, dtype=PRECISIONS[self.precision])


def available(device: torch.device) -> list[str]:
    """Lists the backends that can compile for `device` on this machine."""
    return [name for name, module in BACKENDS.items() if module.unavailable(device) is None]


def build(plan: Compilation, folder: Path, sample: Iterable[torch.Tensor] | None = None) -> CompiledPredictor:
    """Compiles an engine into `folder`, atomically; an existing folder is replaced.

    Args:
        sample: batches of normalised images on which the engine is first compared with eager.

    Raises:
        UserError: the backend is missing or fails, or the engine disagrees with eager.
    """
    module = BACKENDS[plan.backend]
    if reason := module.unavailable(plan.device):
        raise UserError(f"--backend {plan.backend}: {reason}")
    with _replaced(folder) as temporary:
        log.say(f"compiling the predictor with {plan.backend} in {plan.precision} ...")
        began, ready = time.monotonic(), plan.ready()
        shapes = module.build(ready, temporary, shapes=plan.shapes, device=plan.device,
                              dtype=PRECISIONS[plan.precision], frozen=plan.frozen)
        compile_s = time.monotonic() - began
        run = module.load(temporary, device=plan.device)
        record = EngineRecord(
            backend=plan.backend, precision=plan.precision, frozen=plan.frozen, weights_sha256=plan.weights,
            architecture=plan.architecture, classes=plan.classes, shapes=shapes,
            device=Device.of(plan.device), versions=plan.versions(), compile_s=round(compile_s, 1),
            files={path.name: files.sha256(path) for path in sorted(temporary.iterdir())})
        verify(run, ready, record, plan.device)
        predictor = CompiledPredictor(run, record, identity=plan.identity(), dtype=PRECISIONS[plan.precision],
                                      eager=plan.eager)
        if sample is not None:
            record = dataclasses.replace(record, agreement=_agreement(predictor, plan, sample))
        _write_folder(plan, record, temporary)
    log.say(f"{record.describe()} compiled in {compile_s:.0f} s: {folder}")
    return predictor


def write_eager_folder(plan: Compilation, folder: Path) -> None:
    """Writes an engine folder with the network alone, for the eager backend."""
    record = EngineRecord(
        backend="eager", precision=plan.precision, frozen=False, weights_sha256=plan.weights,
        architecture=plan.architecture, classes=plan.classes, shapes=plan.shapes,
        device=Device.of(plan.device), versions=plan.versions(), compile_s=0.0, files={})
    with _replaced(folder) as temporary:
        _write_folder(plan, record, temporary)


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder that replaces `folder` when the block succeeds.

    Raises:
        UserError: it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files.replace_folder(temporary, folder)
    except OSError as error:
        raise UserError(f"engine {folder}: {error.strerror} ({error.filename}); choose another "
                        "folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_folder(plan: Compilation, record: EngineRecord, folder: Path) -> None:
    """Writes `checkpoint.pt` and a signed `engine.json`."""
    rule = {} if plan.exif is None else {"reading": {"exif": plan.exif}}
    if (pretrained := getattr(plan.network, "pretrained", None)) is not None:
        rule["pretrained"] = pretrained
    checkpoints.save(folder / records.WEIGHTS, model=plan.network.state_dict(), classes=list(plan.classes),
                     architecture=plan.architecture, **rule)
    records.write(folder, record, trust.sign(record))


def cached(plan: Compilation, cache: Path) -> CompiledPredictor:
    """Loads the engine of `plan` from the folder `cache` if it is valid and built by this user; else the
    first process compiles it."""
    folder = cache / plan.key()
    with _build_lock(cache, f".{plan.key()}.lock"):
        # temporary folders of killed processes
        for left in (*cache.glob(f".{plan.key()}.*.tmp"), *cache.glob(f".{plan.key()}.*.old")):
            shutil.rmtree(left, ignore_errors=True)
        if (folder / records.NAME).exists():
            record, reason = check(folder, plan)
            if reason is None:
                return load(folder, record, plan)
            log.say(f"engine {folder} is not used: {reason}; compiling it again")
        return build(plan, folder)


def check(folder: Path, plan: Compilation, *,
          trusted: bool = False) -> tuple[EngineRecord | None, str | None]:
    """Checks an engine folder. Returns its record, and the reason why it cannot serve `plan`, or None."""
    try:
        record, signature = records.read(folder)
    except UserError as error:
        return None, str(error)
    reason = record.mismatch(device=Device.of(plan.device), versions=plan.versions())
    if reason is None and record.frozen and record.weights_sha256 != plan.weights:
        reason = "compiled from other weights"
    if reason is None and not trusted and not trust.is_own(record, signature):
        reason = "it was not built by this user"
    if reason is None and (name := trust.altered_file(folder, record)):
        reason = f"{name} is missing or was changed"
    return record, reason


def load(folder: Path, record: EngineRecord, plan: Compilation) -> CompiledPredictor:
    """Loads a checked engine, and swaps in the weights of `plan` if they differ.

    Raises:
        UserError: with these weights the engine disagrees with eager.
    """
    module, swap = BACKENDS[record.backend], record.weights_sha256 != plan.weights
    ready = plan.ready() if swap else None
    run = module.load(folder, device=plan.device, **({"swapped": ready} if swap else {}))
    if swap:
        verify(run, ready, record, plan.device)
        log.say(f"{record.describe()}: weights swapped in, without compiling")
    return CompiledPredictor(run, record, identity=plan.identity(), dtype=PRECISIONS[record.precision],
                             eager=plan.eager)


@torch.no_grad()
def verify(run: Run, ready: nn.Module, record: EngineRecord, device: torch.device) -> None:
    """Compares an engine with its network, in the same precision, on one small image and on a batch.

    Raises:
        UserError: the logits differ.
    """
    low, high = record.shapes.smallest, record.shapes.largest
    several = tuple(min(max(side, least), most) for side, least,
                    most in zip((3, 65, 97), low, high, strict=True))
    generator = torch.Generator().manual_seed(0)
    for count, height, width in (low, several):
        images_NCHW = torch.randn(count, 3, height, width, generator=generator)
        images_NCHW = images_NCHW.to(device, PRECISIONS[record.precision]).contiguous(
            memory_format=torch.channels_last
        )
        logits, truth = run(images_NCHW), ready(images_NCHW)
        same_shape = logits.shape == truth.shape
        error = float((logits - truth).abs().max() / truth.abs().max()) if same_shape else float("inf")
        if not error <= TOLERANCE[record.precision]:
            raise UserError(f"{record.describe()}: logits of {count} images of {width}x{height} are off by "
                            f"{error:.3g} of the largest; the engine is not used; use --backend eager or "
                            "another --precision")


def _agreement(predictor: CompiledPredictor, plan: Compilation,
               sample: Iterable[torch.Tensor]) -> records.Agreement:
    truth, *rounded = plan.references()
    with torch.no_grad():
        agreement, *rounded = gate.compare([predictor.logits, *rounded], truth, sample)
    gate.accept(agreement, predictor.record.describe(), *rounded)
    return agreement


@contextlib.contextmanager
def _build_lock(cache: Path, name: str) -> Iterator[None]:
    """Waits until no other process builds the same engine; without file locks, the later of two builds
    replaces the first."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(cache / name))
        except OSError as error:
            raise UserError(f"folder of engines {cache}: {error.strerror}; set XDG_CACHE_HOME, or use "
                            "--backend eager") from None
        yield
