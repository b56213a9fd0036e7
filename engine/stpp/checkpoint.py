"""Checkpoints: written whole, read without executing anything they hold."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from stpp import files
from stpp.errors import UserError

FORMAT = 1


def save(path: str | Path, **content: Any) -> None:
    """Writes `content` (tensors, numbers, strings, containers of them) atomically."""
    with files.atomic(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: str | Path) -> dict:
    """Reads a checkpoint onto the CPU with `weights_only=True`.

    Raises:
        UserError: missing, damaged, not a checkpoint of this project, or of a newer format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint written by this version of stpp")
    return content
