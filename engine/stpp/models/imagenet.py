"""torchvision's ResNets trained on ImageNet, in the cache that every program with PyTorch shares."""

import contextlib
import http.client
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from stpp import files, log
from stpp.errors import UserError

URL = "https://download.pytorch.org/models/"
NAMES = {"resnet18": "resnet18-f37072fd.pth", "resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}
"""The files that the public code of ST++ starts from (torchvision's V1), and ResNet-18's. A name ends in the first digits of the
file's SHA-256."""
SILENCE_S = 60.0
"""A server that sends nothing for so long is given up."""


def weights_file(backbone: str) -> Path:
    """Path of the weights of `backbone`, a key of `NAMES`: downloaded unless a whole file is there.

    Of the processes of a machine one downloads and the others wait for it.

    Raises:
        UserError: they cannot be downloaded. It names the file, and where to put it by hand.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / NAMES[backbone]
    try:
        if _is_whole(path):
            return path
        with files.locked(path.with_name(f".{path.name}.lock")):
            if not _is_whole(path):
                log.say(f"  {path}: {'damaged; ' if path.exists() else ''}downloading {URL}{path.name}")
                with _limited_silence():
                    torch.hub.download_url_to_file(URL + path.name, str(path), _hash_of(path), progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--model.pretrained imagenet: {URL}{path.name} cannot be had ({reason}); fetch it on another machine "
                        f"and put it at {path}, or give its path in place of imagenet") from None
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file is there and is what its name says."""
    return path.is_file() and files.sha256(path).startswith(_hash_of(path))


def _hash_of(path: Path) -> str:
    """The first digits of the SHA-256, from a published name."""
    return path.stem.rpartition("-")[2]


@contextlib.contextmanager
def _limited_silence() -> Iterator[None]:
    """New connections of this process give up after a while: PyTorch's download has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
