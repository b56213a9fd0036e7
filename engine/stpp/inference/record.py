"""Record of an engine, `engine.json`: its weights, inputs, device and versions."""

import dataclasses
import hashlib
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import __version__, files
from stpp.errors import UserError

FORMAT = 1
NAME = "engine.json"
WEIGHTS = "checkpoint.pt"
"""Checkpoint of an engine's network, from which the engine can be rebuilt and checked."""
SHAPE_TEXTS = ("1x32x32", "4x360x480", "16x1024x2048")


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Range of an engine's inputs: (images, rows, columns)."""

    smallest: tuple[int, int, int]
    typical: tuple[int, int, int]
    """Input that the engine is tuned for."""
    largest: tuple[int, int, int]

    @classmethod
    def parse(cls, texts: Iterable[str] = SHAPE_TEXTS) -> "Shapes":
        """Parses three texts `NxHxW`, from the smallest to the largest.

        Raises:
            UserError: not three texts of this form, or a side that shrinks from one to the next.
        """
        texts = list(texts)
        matches = [re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})", text) for text in texts]
        if len(matches) != 3 or not all(matches):
            raise UserError(f"--shapes {' '.join(texts)}: expected smallest, typical and largest input as "
                            f"NxHxW, for example {' '.join(SHAPE_TEXTS)}")
        smallest, typical, largest = (tuple(int(side) for side in match.groups()) for match in matches)
        if any(not low <= mid <= high for low, mid, high in zip(smallest, typical, largest, strict=True)):
            raise UserError(f"--shapes {' '.join(texts)}: no side may shrink from the smallest to the "
                            "largest")
        return cls(smallest=smallest, typical=typical, largest=largest)

    def hold(self, images_NCHW: torch.Tensor) -> bool:
        """Checks that images are within the range."""
        sides = (images_NCHW.shape[0], *images_NCHW.shape[2:])
        return all(low <= side <= high for low, side,
                   high in zip(self.smallest, sides, self.largest, strict=True))


DEFAULT_SHAPES = Shapes.parse()
ANY_SIZE = Shapes(smallest=(1, 1, 1), typical=DEFAULT_SHAPES.typical, largest=(1 << 20,) * 3)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of an engine's masks with those of the float32 eager network."""

    raw: float
    """Share of all pixels with the same class, in [0, 1]."""
    outside: float
    """Share of decided pixels with the same class: eager's two largest probabilities differ by at least
    `margin`."""
    margin: float
    decided: float
    """Share of decided pixels."""
    pixels: int
    """Pixels compared."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Device that native code was built for."""

    kind: str
    """"cpu" or "cuda"."""
    name: str
    """Display name of the processor or GPU."""
    capability: str
    """Instruction sets of a CPU, compute capability of a GPU."""

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """Describes a device of this machine."""
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            return cls(kind="cuda", name=torch.cuda.get_device_name(device), capability=f"sm_{major}{minor}")
        facts = _cpu_facts()
        # compiled code may use any of them
        flags = " ".join(sorted(set(facts.get("flags", facts.get("Features", "")).split())))
        digest = hashlib.sha256(flags.encode()).hexdigest()[:12]
        return cls(kind="cpu", name=facts.get("model name", platform.processor() or platform.machine()),
                   capability=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest}")


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Content of `engine.json`."""

    format: int = FORMAT
    backend: str
    precision: str
    """Type of weights and feature maps: bf16, fp16 or fp32; logits are always float32."""
    frozen: bool
    """True if the weights are compiled in; otherwise another predictor's can replace them."""
    weights_sha256: str
    """Hash of the compiled network's weights, see the function `weights_sha256`."""
    architecture: dict
    classes: tuple[str, ...]
    shapes: Shapes
    device: Device
    versions: dict[str, str]
    """Versions of all packages that the engine depends on: stpp, torch, the compiler."""
    compile_s: float
    files: dict[str, str]
    """SHA-256 of every file of the engine."""
    agreement: Agreement | None = None
    """Agreement on the sample images given at compile time."""

    def mismatch(self, *, device: Device, versions: dict[str, str]) -> str | None:
        """Reason why the engine cannot run here; None if it can.

        Args:
            device: device to run on.
            versions: see `versions_of`, for this engine's backend.
        """
        if self.device.kind != device.kind or self.device.capability != device.capability:
            return (f"built for {self.device.name} ({self.device.capability}), "
                    f"this is {device.name} ({device.capability})")
        if device.kind == "cuda" and self.device.name != device.name:
            return f"built for {self.device.name}, this is {device.name}"
        for name in sorted(self.versions.keys() | versions.keys()):
            if self.versions.get(name) != versions.get(name):
                return f"built with {name} {self.versions.get(name)}, this is {name} {versions.get(name)}"
        return None

    def describe(self) -> str:
        """Describes the engine in a few words, for log lines."""
        return f"{self.backend} {self.precision} engine for {self.device.name}"


def versions_of(**compiler: str) -> dict[str, str]:
    """Versions that an engine depends on; `compiler` gives those of the backend."""
    return {"stpp": __version__, "torch": torch.__version__, **compiler}


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """Hashes a network's weights: names, dtypes, shapes and values, in the order of names; independent of
    memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(folder: Path, record: EngineRecord, signature: str) -> None:
    """Writes `engine.json`, with its signature (`stpp.inference.trust`)."""
    files.write_json(folder / NAME, {**dataclasses.asdict(record), "signature": signature})


def read(folder: Path) -> tuple[EngineRecord, str]:
    """Reads the record of an engine folder, and its signature.

    Raises:
        UserError: the folder is no engine, is damaged, or is of another version.
    """
    path = Path(folder) / NAME
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        signature = str(table.pop("signature", ""))
        if table["format"] != FORMAT:
            raise UserError(f"{path}: format {table['format']}, expected {FORMAT}; compile the engine again")
        shapes = {name: tuple(int(side) for side in sides) for name, sides in table.pop("shapes").items()}
        agreement = table.pop("agreement")
        record = EngineRecord(**table | {"classes": tuple(table["classes"])}, shapes=Shapes(**shapes),
                              agreement=agreement and Agreement(**agreement))
        return dataclasses.replace(record, device=Device(**table["device"])), signature
    except OSError as error:
        raise UserError(f"{folder}: no engine ({NAME}: {error.strerror}); give a folder that `stpp compile` "
                        "wrote, or a checkpoint") from None
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}); compile the engine "
                        "again") from None


def canonical(record: EngineRecord) -> bytes:
    """Serialises a record to canonical bytes, for the signature."""
    return json.dumps(dataclasses.asdict(record), sort_keys=True).encode()


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n")[0]
    return {key.strip(): value.strip() for key, _,
            value in (line.partition(":") for line in first.splitlines())}
