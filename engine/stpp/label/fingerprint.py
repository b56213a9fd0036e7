"""Fingerprint of a labelling: `run.json`, a record of everything that determines the masks."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from stpp import files
from stpp.config import differing_keys
from stpp.errors import UserError
from stpp.versions import version_of

FORMAT = "stpp-label-1"


def read(out: Path) -> dict | None:
    """Reads `run.json`; None if no run has begun.

    Raises:
        UserError: the file is damaged, or not of a labelling.
    """
    path = out / "run.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --out") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not written by `stpp label` of this version; choose another --out")
    return value


def write(out: Path, fingerprint: dict, plan: dict, classes: Sequence[str], planned_for: int) -> None:
    """Writes `run.json`, which fixes the plan; class names are recorded outside the fingerprint.

    Args:
        planned_for: number of images when the run began, by which a predictor was chosen.
    """
    versions = {name: version_of(name)
                for name in ("stpp", "torch", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")}
    files.write_json(out / "run.json", {"format": FORMAT, "fingerprint": fingerprint, "plan": plan,
                                        "planned_for": planned_for, "classes": list(classes),
                                        "versions": {"python": platform.python_version()} | versions})


def planned_for(begun: dict) -> int:
    """Number of images for which the predictor was chosen; updates do not change it."""
    return begun.get("planned_for", begun["plan"]["items"])


def require_same(out: Path, recorded: dict, current: dict) -> None:
    """Rejects an output that was begun with other settings.

    Raises:
        UserError: names the differing keys, with both values.
    """
    differing = differing_keys(_comparable(current), _comparable(recorded), may_change=())
    if differing:
        raise UserError(f"--out {out} holds masks of another run ({'; '.join(differing)}); choose another "
                        "--out, or the settings it was begun with")


def _comparable(fingerprint: dict) -> dict:
    """Drops a field of earlier versions that does not affect the result."""
    cut = fingerprint.get("cut")
    if not cut or cut.get("pad_to") not in (0, 1):
        return fingerprint
    return fingerprint | {"cut": {name: value for name, value in cut.items() if name != "pad_to"}}


def device_kind(device: torch.device) -> str:
    """Describes the kind of a device; equal kinds are expected to compute equal masks."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
