"""Loading of weights: published backbones, published networks, and checkpoints of this package.

Files are untrusted, so only tensors and plain containers are unpickled.
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
"""Keys under which a file may hold a state dict; the first one present is read. UniMatch V2 evaluates its
`model_ema`."""
PREFIXES = ("module.", "_orig_mod.")
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Result of loading a file into a network."""

    path: str
    total: int
    """Number of tensors of the network (or its backbone)."""
    loaded: int
    """Number of tensors copied from the file."""
    left_out: tuple[str, ...] = ()
    """Keys of the file that the network lacks."""
    missing: tuple[str, ...] = ()
    """Keys of the network that the file lacks; their tensors are unchanged."""
    mismatched: tuple[str, ...] = ()
    """Keys with different shapes, each with the file's and the network's; their tensors are unchanged."""

    def summary(self) -> str:
        """Formats the counts and the keys that did not fit, in one line."""
        loaded = f"{self.loaded} of {self.total} tensors loaded from {Path(self.path).name}"
        misfits = {"missing in the file": self.missing, "of another shape": self.mismatched,
                   "left out": self.left_out}
        return "; ".join(filter(None, (loaded, named_keys(misfits))))


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU without running code in it.

    Of a file with `model` and its moving average `model_ema`, the average is read, which is logged;
    `best.pth#model` selects the other.

    Returns:
        Dict in the file: a state dict, or a dict that holds one under a key of `WRAPPERS`.

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
    """Removes the networks that are not selected."""
    wrapped = [key for key in WRAPPERS if isinstance(content.get(key), dict)]
    if part is not None and part not in wrapped:
        raise UserError(f"checkpoint {file} holds no {part!r}; it has "
                        f"{', '.join(wrapped) or 'one state dict'}")
    if part is None and len(wrapped) > 1:
        others = " or ".join(f"{file.name}#{key}" for key in wrapped[1:])
        log.say(f"{file}: {wrapped[0]} is read; {others} selects the other")
    read = part or next(iter(wrapped), None)
    return {key: value for key, value in content.items() if key == read or key not in wrapped}


def state_dict_of(content: dict) -> dict[str, object]:
    """Extracts the state dict from the content of `read_checkpoint`, without wrapper and key prefixes."""
    state = {str(key): value for key, value in _unwrapped(content).items()}
    while state and (common := [prefix for prefix in PREFIXES
                                if all(key.startswith(prefix) for key in state)]):
        state = {key.removeprefix(common[0]): value for key, value in state.items()}
    return state


def load_backbone(model: Network, path: str | os.PathLike) -> LoadReport:
    """Loads `model.backbone` from a published file, or from a whole network with keys `backbone.*`.

    Other tensors of the file, for example its classifier, are left out and reported.

    Raises:
        UserError: the file is invalid (see `read_checkpoint`), lacks a tensor of the backbone, has one with
            another shape, or has tensors of another backbone.
    """
    return load_backbone_state(model, state_dict_of(read_checkpoint(path)), path)


def load_backbone_state(model: Network, state: dict[str, object], path: str | os.PathLike) -> LoadReport:
    """Loads `model.backbone`, as `load_backbone`, from the state dict of the file `path`."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in state) else ""
    classifier = model.backbone.classifier_keys
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    head = tuple(key for key in state if not key.startswith(prefix) or key.startswith(classifier))
    inside = {key: value for key, value in inside.items() if not key.startswith(classifier)}
    fitting, report = _compare(model.backbone, inside, path)
    _refuse_unfit(report, "the backbone")
    _copy(model.backbone, fitting, path)
    return LoadReport(path=str(path), total=report.total, loaded=report.loaded, left_out=head)


def load_model(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> LoadReport:
    """Loads a whole network from a state dict, plain or under a key of `WRAPPERS`; key prefixes (`PREFIXES`)
    are removed.

    Args:
        model: network from `build_model`.
        path: path of the file.
        strict: require that all keys and shapes match. Otherwise only the backbone must match; other tensors
            that do not are unchanged and reported, so that a network for other classes can start from a
            published one.

    Raises:
        UserError: the file is invalid (see `read_checkpoint`), or does not match; names the numbers of
            classes if they differ (and strict), else up to five missing and superfluous keys and differing
            shapes.
    """
    return load_state(model, state_dict_of(read_checkpoint(path)), path, strict)


def load_state(model: nn.Module, state: dict[str, object], path: str | os.PathLike,
               strict: bool = True) -> LoadReport:
    """Loads a whole network, as `load_model`, from the state dict of the file `path`."""
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
    """Selects the tensors of `state` that fit `module`, and makes the report of copying them.

    Batch norm's `num_batches_tracked`, which old files lack and nothing uses, does not count as missing.
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
        total=len(own),
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
            f"checkpoint {path} holds tensors that cannot be copied ({line}); save it as plain float "
            "tensors"
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
        in_classifier = key.startswith(model.classifier_name + ".")
        if not in_classifier or not isinstance(value, Tensor) or value.dim() != own.dim():
            continue
        if value.shape[1:] == own.shape[1:] and len(value) != len(own):
            raise UserError(
                f"checkpoint {path} has {len(value)} classes, but the recipe has {len(own)}; "
                "give as many classes as the checkpoint has, or another checkpoint"
            )


def named_keys(kinds: Mapping[str, Sequence[str]]) -> str:
    """Formats the non-empty kinds, each with up to five keys, in one line.

    Keys come from untrusted files: unprintable characters are escaped, and long keys are cut.
    """
    return "; ".join(f"{kind}: {_some(keys)}" for kind, keys in kinds.items() if keys)


def _some(keys: Sequence[str]) -> str:
    text = ", ".join((key if key.isprintable() else ascii(key))[:150] for key in keys[:SHOWN])
    return text + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
