"""Checkpoints: written whole, read without executing anything they hold."""

import re
import warnings
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
    """Reads what `save` wrote, onto the CPU.

    Raises:
        UserError: see `read`; or the file was not written by `save`, or by a newer version.
    """
    content = read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint written by this version of stpp")
    return content


def read(path: str | Path) -> Any:
    """Reads a PyTorch file of anyone onto the CPU, without running any code in it.

    Raises:
        UserError: the file is missing, unreadable or damaged, or holds objects other than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {found}; give the path of a .pth or .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they advise to load without the protection
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # a damaged or hostile file makes the reader fail in any way there is
        raise UserError(f"checkpoint {path} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file was refused. PyTorch's own text is long and advises to switch the protection off."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds a Python object ({found[1]}) and not only tensors; such objects can run code and are never loaded; "
            "save its state dict alone"
        )
    if "TorchScript" in text:
        return "is a TorchScript program; save its state dict instead"
    return "is truncated, damaged, or not a PyTorch file; fetch or save it again"
