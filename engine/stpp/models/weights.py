"""Weights from files: published backbones, published networks, and our own checkpoints.

Files come from strangers, so nothing but tensors and plain containers is ever unpickled.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from stpp import checkpoint, files, log
from stpp.errors import UserError
from stpp.models.network import Network

WRAPPERS = ("model_ema", "model", "state_dict")
"""Keys under which a file may hold a state dict; of several the first is read. UniMatch V2 scores its
`model_ema`."""
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What of a file went into a network."""

    path: str
    wanted: int
    """Tensors the network (or its backbone) has."""
    loaded: int
    """Tensors copied from the file."""
    left_out: tuple[str, ...] = ()
    """Keys of the file for which there is no place."""
    missing: tuple[str, ...] = ()
    """Keys of the network that the file lacks; they keep the values they had."""
    mismatched: tuple[str, ...] = ()
    """Keys of other shapes, each with the file's and the network's shape; they keep the values they had."""

    def summary(self) -> str:
        """One line: how much was loaded, and what did not fit."""
        loaded = f"{self.loaded} of {self.wanted} tensors loaded from {Path(self.path).name}"
        misfits = {"missing in the file": self.missing, "of another shape": self.mismatched,
                   "left out": self.left_out}
        return "; ".join(filter(None, (loaded, named_keys(misfits))))


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU without running any code in it.

    Of a file with several networks, `model` and the mean `model_ema` of its weights, the mean is read and the
    other left out, which is said; `best.pth#model` asks for the other.

    Returns:
        The dict in the file: a state dict, or a dict that holds one under a key of `WRAPPERS`.

    Raises:
        UserError: the file is missing, unreadable or damaged, holds objects other than tensors and plain
            containers, or holds no dict with tensors.
    """
    file, part = files.and_part(path)
    content = checkpoint.read(file)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint {path} holds a {type(content).__name__} where a dict of tensors was expected; "
            "save model.state_dict()"
        )
    if not any(isinstance(value, Tensor) for value in _unwrapped(content).values()):
        raise UserError(f"checkpoint {path} holds no tensors; save model.state_dict()")
    return _one_network(content, file, part)


def _one_network(content: dict, file: Path, part: str | None) -> dict:
    """The content without the networks that are not read."""
    found = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if part is not None and part not in found:
        raise UserError(f"checkpoint {file} holds no {part!r}; it has {', '.join(found) or 'one state dict'}")
    if part is None and len(found) > 1:
        log.say(f"{file}: {found[0]} is read; {' or '.join(f'{file.name}#{key}' for key in found[1:])} names "
                "the other")
    read = part or next(iter(found), None)
    return {key: value for key, value in content.items() if key == read or key not in found}


def state_dict_of(content: dict) -> dict[str, object]:
    """The state dict in what `read_checkpoint` gave, free of its wrapper and of "module." before every
    key."""
    state = {str(key): value for key, value in _unwrapped(content).items()}
    while state and (common := [prefix for prefix in PREFIXES
                                if all(key.startswith(prefix) for key in state)]):
        state = {key.removeprefix(common[0]): value for key, value in state.items()}
    return state


def load_backbone(model: Network, path: str | os.PathLike) -> LoadReport:
    """Loads `model.backbone` from a published file, or from a whole network with keys `backbone.*`.

    The file's classifier, or whatever of a network is not backbone, is left out and reported.

    Raises:
        UserError: the file is unfit (see `read_checkpoint`), lacks a tensor of the backbone, has one in
            another shape, or has tensors of another backbone.
    """
    return load_backbone_state(model, state_dict_of(read_checkpoint(path)), path)


def load_backbone_state(model: Network, state: dict[str, object], path: str | os.PathLike) -> LoadReport:
    """As `load_backbone`, with what `state_dict_of` found in the file `path`."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    classifier = model.backbone.classifier_keys
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    head = tuple(key for key in state if not key.startswith(prefix) or key.startswith(classifier))
    inside = {key: value for key, value in inside.items() if not key.startswith(classifier)}
    fitting, report = _compare(model.backbone, inside, path)
    _refuse_unfit(report, "the backbone")
    _copy(model.backbone, fitting, path)
    return LoadReport(path=str(path), wanted=report.wanted, loaded=report.loaded, left_out=head)


def load_model(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> LoadReport:
    """Loads a whole network: a state dict, plain or under a key of `WRAPPERS`, "module." before its keys or
    not.

    Args:
        model: a network from `build_model`.
        path: the file.
        strict: refuse a file that does not fit in every key and shape. Otherwise only the backbone has to
            fit; what else does not keeps its values and stands in the report, so a network for other classes
            can start from a published one.

    Raises:
        UserError: the file is unfit (see `read_checkpoint`), or does not fit: the numbers of classes are
            named if these differ (and strict), else up to five of the missing and superfluous keys and
            differing shapes.
    """
    return load_state(model, state_dict_of(read_checkpoint(path)), path, strict)


def load_state(model: nn.Module, state: dict[str, object], path: str | os.PathLike,
               strict: bool = True) -> LoadReport:
    """As `load_model`, with what `state_dict_of` found in the file `path`."""
    fitting, report = _compare(model, state, path)
    if strict:
        _refuse_other_classes(model, state, path)
        _refuse_unfit(report, "the network")
    else:
        _refuse_unfit(_backbone_part(report), "the backbone")
    _copy(model, fitting, path)
    return report


def _unwrapped(content: dict) -> dict:
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def _compare(
    module: nn.Module, state: dict[str, object], path: str | os.PathLike
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of `state` that fit `module`, and the report as it will be once they are copied.

    Files older than batch norm's `num_batches_tracked` lack it; nothing here uses it, so it does not count as
    missing.
    """
    own = module.state_dict()
    fitting, mismatched = {}, []
    for key in own.keys() & state.keys():
        value = state[key]
        if isinstance(value, Tensor) and value.shape == own[key].shape:
            fitting[key] = value
        else:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            mismatched.append(f"{key} ({shape} in the file, {tuple(own[key].shape)} wanted)")
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    left_out = [key for key in state if key not in own]
    report = LoadReport(
        path=str(path),
        wanted=len(own),
        loaded=len(fitting),
        left_out=tuple(left_out),
        missing=tuple(missing),
        mismatched=tuple(sorted(mismatched)),
    )
    return fitting, report


def _copy(module: nn.Module, fitting: dict[str, Tensor], path: str | os.PathLike) -> None:
    try:
        module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # sparse, quantised or complex tensors of the right shape
        line = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path} holds tensors of a kind that cannot be copied ({line}); save it as plain "
            "float tensors"
        ) from error


def _backbone_part(report: LoadReport) -> LoadReport:
    parts = {
        field: tuple(key for key in getattr(report, field) if key.startswith("backbone."))
        for field in ("left_out", "missing", "mismatched")
    }
    return dataclasses.replace(report, **parts)


def _refuse_unfit(report: LoadReport, what: str) -> None:
    if report.missing or report.mismatched or report.left_out:
        misfits = {"missing": report.missing, "superfluous": report.left_out,
                   "other shapes": report.mismatched}
        raise UserError(f"checkpoint {report.path} does not fit {what} ({named_keys(misfits)}); check the "
                        "model and backbone of the recipe")


def _refuse_other_classes(model: nn.Module, state: dict[str, object], path: str | os.PathLike) -> None:
    for key, own in model.state_dict().items():
        value = state.get(key)
        if not key.startswith(model.classifier_name
                              + ".") or not isinstance(value, Tensor) or value.dim() != own.dim():
            continue
        if value.shape[1:] == own.shape[1:] and len(value) != len(own):
            raise UserError(
                f"checkpoint {path} has {len(value)} classes, but the recipe has {len(own)}; "
                "name as many classes as the checkpoint knows, or take another checkpoint"
            )


def named_keys(kinds: Mapping[str, Sequence[str]]) -> str:
    """The kinds that have keys, each with up to five, on one line.

    Keys are the file's: what could upset a terminal is escaped, and none is endless.
    """
    return "; ".join(f"{kind}: {_some(keys)}" for kind, keys in kinds.items() if keys)


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join((key if key.isprintable() else ascii(key))[:150] for key in keys[:SHOWN])
    return shown + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
