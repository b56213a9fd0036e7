"""Whose output a folder is: `run.json`, which everything that decides the masks is written in."""

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
    """The content of `run.json`; None where no run began.

    Raises:
        UserError: damaged, or of something else.
    """
    path = out / "run.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); choose another --out") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not of a labelling by this version; choose another --out")
    return value


def write(out: Path, fingerprint: dict, plan: dict, classes: Sequence[str] = ()) -> None:
    """Writes `run.json`: from here on the plan counts. Names of classes stand beside what decides the
    masks."""
    versions = {name: version_of(name)
                for name in ("stpp", "torch", "pillow", "nvidia-dali-cuda120", "nvidia-dali-cuda130")}
    files.write_json(out / "run.json", {"format": FORMAT, "fingerprint": fingerprint, "plan": plan,
                                        "classes": list(classes),
                                        "versions": {"python": platform.python_version()} | versions})


def require_same(out: Path, theirs: dict, ours: dict) -> None:
    """Refuses to go on with another run's output.

    Raises:
        UserError: names what differs, and both values.
    """
    differing = differing_keys(_comparable(ours), _comparable(theirs), may_change=())
    if differing:
        raise UserError(f"--out {out} holds masks of another run ({'; '.join(differing)}); choose another "
                        "--out, or what it was begun with")


def _comparable(fingerprint: dict) -> dict:
    """Without what a version before wrote that makes no difference."""
    cut = fingerprint.get("cut")
    if not cut or cut.get("pad_to") not in (0, 1):
        return fingerprint
    return fingerprint | {"cut": {name: value for name, value in cut.items() if name != "pad_to"}}


def device_kind(device: torch.device) -> str:
    """What computes: equal kinds are expected to compute equal masks."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
