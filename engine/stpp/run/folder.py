"""The run directory: whose it is, and what its run is made of."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stpp import files
from stpp.config import Config, differing_keys, flatten, to_dict
from stpp.errors import UserError
from stpp.versions import version_of


def claim(config: Config) -> None:
    """Takes the run directory for this config.

    Raises:
        UserError: it holds a run of another config; the keys that differ are named.
    """
    path, ours = config.out / "config.json", to_dict(config)
    began = any(config.out.glob("stages/*/*"))
    if began and not path.exists():
        raise UserError(f"--out {config.out} holds stages of a run without config.json; choose another --out")
    if began:
        # What the version that began the run did not know has its default.
        theirs = flatten(to_dict(Config())) | flatten(_table(path))
        differing = differing_keys(ours, theirs)
        if differing:
            raise UserError(f"--out {config.out} holds a run of another config ({'; '.join(differing)}); "
                            "choose another --out, or the old settings")
    files.write_json(path, ours)


def record_provenance(out: Path, fingerprint: str, classes: Sequence[str]) -> None:
    """Writes what the run is made of beside its config.

    Args:
        fingerprint: of the data set's index.

    Raises:
        UserError: the run began with other data.
    """
    path = out / "provenance.json"
    began = any(out.glob("stages/*/*")) and path.exists()
    if began and _table(path).get("data") != fingerprint:
        raise UserError(f"--out {out}: the data set changed since this run began; choose another --out")
    files.write_json(path, {"data": fingerprint, "classes": list(classes), **_provenance()})


def _table(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; choose another --out")
    return value


def _provenance() -> dict:
    names = ("stpp", "torch", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "tensorrt", "pillow")
    versions = {name: version for name in names if (version := version_of(name))}
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True,
                         text=True, check=False)
    return {"versions": versions, "python": platform.python_version(), "platform": platform.platform(),
            "git": git.stdout.strip() or None}
