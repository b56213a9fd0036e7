"""Checkpoints: atomic writes, and reads that never execute code in the file."""

import os
import re
import shutil
import warnings
import zipfile
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from stpp import files
from stpp.errors import UserError

FORMAT = 1


def save(path: str | Path, **content: Any) -> None:
    """Writes `content` (tensors, numbers, strings, containers of them) atomically.

    Raises:
        UserError: the disk is full; the previous content of `path` is intact.
    """
    try:
        with files.atomic(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error
        needed, free = size_bytes(content), shutil.disk_usage(Path(path).parent).free
        if needed < free:
            raise
        raise UserError(f"checkpoint {path} needs {needed / 2**20:.0f} MiB and the disk has "
                        f"{free / 2**20:.0f} left; earlier checkpoints are intact: make room and run the "
                        "same command again") from error


class CheckpointWriter:
    """Saves checkpoints one after another in a thread: the caller waits for the copy to the CPU, not for the
    disk."""

    def __init__(self):
        self._pool, self._pending = ThreadPoolExecutor(1, "stpp-checkpoint"), deque()

    def save(self, path: str | os.PathLike, **content: Any) -> None:
        """Queues `save` of a copy of `content`; its errors are raised by a later call or by `wait`."""
        self.wait(leave=1)
        self._pending.append(self._pool.submit(save, path, **cpu_copy(content)))

    def wait(self, leave: int = 0) -> None:
        """Waits until all checkpoints except the `leave` latest are on the disk."""
        while self._pending and (len(self._pending) > leave or self._pending[0].done()):
            self._pending.popleft().result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()


def cpu_copy(value: Any) -> Any:
    """Copies containers, with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: cpu_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cpu_copy(item) for item in value)
    return value


def size_bytes(value: Any) -> int:
    """Counts the bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(size_bytes, value.values()))
    return sum(map(size_bytes, value)) if isinstance(value, (list, tuple)) else 0


def load(path: str | Path) -> dict:
    """Loads a checkpoint that `save` wrote, onto the CPU.

    Raises:
        UserError: see `read`; or the file was not written by this version of `save`.
    """
    return require_own(read(path), path)


def require_own(content: Any, path: str | Path) -> dict:
    """Returns the content of the file `path` if `save` wrote it.

    Raises:
        UserError: the file was not written by this version of `save`.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint written by this version of stpp")
    return content


def peek(path: str | Path) -> Any:
    """Reads a PyTorch file as `read` does, but maps tensors from the disk if the file is a zip archive."""
    return read(path, mmap=zipfile.is_zipfile(path))


class _NumpyValue:
    """Placeholder for NumPy values in third-party files, for example a checkpoint's score; they are unused.

    NumPy's own constructors are unsafe on a crafted file.
    """

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY_NAMES = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
               "numpy.dtypes.Float64DType")


def read(path: str | Path, *, mmap: bool = False) -> Any:
    """Reads any PyTorch file onto the CPU without running code in it; NumPy values in it are dropped.

    Args:
        mmap: map the file into memory instead of reading it whole; only for zip archives (PyTorch's current
            format).

    Raises:
        UserError: the file is missing, unreadable or damaged, or holds objects other than tensors and plain
            containers.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {problem}; give the path of a .pth or .pt file")
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(_NumpyValue, name) for name in NUMPY_NAMES]),
        ):
            warnings.simplefilter("ignore")  # they advise unprotected loading
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check its "
                        "permissions") from error
    except Exception as error:  # a damaged or hostile file can raise anything
        raise UserError(f"checkpoint {path} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Reason for a rejected file. PyTorch's own text is long and advises unprotected loading."""
    text = str(error)
    if match := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds a Python object ({match[1]}) besides tensors; Python objects can run code and are never "
            "loaded; save only the state dict"
        )
    if "TorchScript" in text:
        return "is a TorchScript program; save its state dict instead"
    return "is truncated, damaged, or not a PyTorch file; fetch or save it again"
