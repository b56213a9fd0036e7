"""Run folder: its config, and the provenance of the run."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from stpp import files, outputs
from stpp.config import Config, differing_keys, flatten, to_dict
from stpp.errors import UserError
from stpp.versions import version_of

OUTPUTS = ("config.json", "provenance.json", "split", "held-out.txt", "index", "given", "stages",
           "results.json", "examples.png", "report")
"""Files and folders of a run."""


def has_begun(out: Path) -> bool:
    """True if a stage of the run has begun."""
    return any(out.glob("stages/*/*"))


def claim(config: Config) -> None:
    """Claims the run folder for this config.

    Raises:
        UserError: the folder holds a run of another config (names the differing keys), or other files of
            these names.
    """
    path, current = config.out / "config.json", to_dict(config)
    began = has_begun(config.out)
    if began and not path.exists():
        raise UserError(f"--out {config.out} holds stages of a run without config.json; choose another --out")
    if began:
        # Settings unknown to the version that began the run have their defaults.
        recorded = flatten(to_dict(Config())) | flatten(_json_object(path))
        differing = differing_keys(current, recorded)
        if differing:
            raise UserError(f"--out {config.out} holds a run of another config ({'; '.join(differing)}); "
                            "choose another --out, or the old settings")
    outputs.claim(config.out, OUTPUTS, earlier=path.name if began else "provenance.json")
    files.write_json(path, current)


def record_provenance(out: Path, contents: str, classes: Sequence[str]) -> None:
    """Writes `provenance.json`: data set, classes, package versions and Git commit.

    Args:
        contents: digest of the data set's files, see stpp.dataset.entries.Index.

    Raises:
        UserError: the run began with other data.
    """
    path = out / "provenance.json"
    recorded = _json_object(path) if has_begun(out) and path.exists() else {}
    if recorded.get("data", contents) != contents:
        raise UserError(f"--out {out}: the data set changed since this run began; choose another --out")
    lists = {"lists": recorded["lists"]} if "lists" in recorded else {}
    files.write_json(path, {"data": contents, **lists, "classes": list(classes), **_provenance()})


def record_lists(out: Path, digest: str) -> None:
    """Adds the digest of the run's lists to `provenance.json`.

    Raises:
        UserError: the run began with other lists.
    """
    path = out / "provenance.json"
    recorded = _json_object(path)
    if has_begun(out) and recorded.get("lists", digest) != digest:
        raise UserError(f"--out {out}: the lists of images changed since this run began; choose another "
                        "--out, or restore them")
    files.write_json(path, {**recorded, "lists": digest})


def _json_object(path: Path) -> dict:
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
