"""Checkpoints: written whole, read without executing anything they hold."""

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
        UserError: no room on the disk. What `path` held before is intact.
    """
    try:
        with files.atomic(path) as file:
            torch.save({"format": FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:  # PyTorch's writer tells little of what the system said
        needed, free = size_bytes(content), shutil.disk_usage(Path(path).parent).free
        if needed < free:
            raise
        raise UserError(f"checkpoint {path} needs {needed / 2**20:.0f} MiB and the disk has "
                        f"{free / 2**20:.0f} left; what was saved before is intact: make room and give the "
                        "same command again") from error


class CheckpointWriter:
    """Saves checkpoints in a thread, one after the other: the caller waits for a copy off the device, not for
    the disk."""

    def __init__(self):
        self._pool, self._pending = ThreadPoolExecutor(1, "stpp-checkpoint"), deque()

    def save(self, path: str | os.PathLike, **content: Any) -> None:
        """As the function `save`, of `content` as it is now; what it raises is raised by a later call or by
        `wait`."""
        self.wait(leave=1)
        self._pending.append(self._pool.submit(save, path, **copied(content)))

    def wait(self, leave: int = 0) -> None:
        """Returns when everything, but for the `leave` latest, is on the disk."""
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


def copied(value: Any) -> Any:
    """The same containers with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(one) for one in value)
    return value


def size_bytes(value: Any) -> int:
    """Bytes of the tensors in containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(size_bytes, value.values()))
    return sum(map(size_bytes, value)) if isinstance(value, (list, tuple)) else 0


def load(path: str | Path) -> dict:
    """Reads what `save` wrote, onto the CPU.

    Raises:
        UserError: see `read`; or the file was not written by `save`, or by a newer version.
    """
    return ours(read(path), path)


def ours(content: Any, path: str | Path) -> dict:
    """What `read` found in the file `path`, if `save` wrote it.

    Raises:
        UserError: it was not written by `save`, or by a newer version.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint written by this version of stpp")
    return content


def peek(path: str | Path) -> Any:
    """As `read`, but tensors are left on the disk, if the file's form allows it, until somebody looks at
    them."""
    return read(path, mmap=zipfile.is_zipfile(path))


class _NumpyValue:
    """Takes the place of NumPy's numbers in files of others, such as the score of a checkpoint: nothing here
    needs them.

    NumPy's own constructors would make of a crafted file whatever it wants.
    """

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


NUMPY_NAMES = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
               "numpy.dtypes.Float64DType")


def read(path: str | Path, *, mmap: bool = False) -> Any:
    """Reads a PyTorch file of anyone onto the CPU, without running any code in it; NumPy's numbers in it are
    lost.

    Args:
        mmap: map the file into memory instead of reading all of it; it must be a zip archive, as PyTorch's
            are today.

    Raises:
        UserError: the file is missing, unreadable or damaged, or holds objects other than tensors and plain
            containers.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {path} {found}; give the path of a .pth or .pt file")
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(_NumpyValue, name) for name in NUMPY_NAMES]),
        ):
            warnings.simplefilter("ignore")  # they advise to load without the protection
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check its "
                        "permissions") from error
    except Exception as error:  # a damaged or hostile file makes the reader fail in any way there is
        raise UserError(f"checkpoint {path} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Why a file was refused. PyTorch's own text is long and advises to switch the protection off."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)", text):
        return (
            f"holds a Python object ({found[1]}) and not only tensors; such objects can run code and are "
            "never loaded; save its state dict alone"
        )
    if "TorchScript" in text:
        return "is a TorchScript program; save its state dict instead"
    return "is truncated, damaged, or not a PyTorch file; fetch or save it again"
