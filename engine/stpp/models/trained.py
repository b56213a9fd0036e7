"""Loading of trained networks: checkpoints of a run, and third-party state dicts, which do not record their
architecture."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stpp import checkpoint, log
from stpp.config import check_view
from stpp.errors import UserError
from stpp.models.build import BACKBONES, NETWORKS, build_model, stride_of
from stpp.models.pretrained import record_of
from stpp.models.weights import load_state, named_keys, read_checkpoint, state_dict_of

MAX_CLASSES = 255
"""Maximum classes of a mask: 255 is "ignore"."""
UNCOUNTED = ".num_batches_tracked"
"""Suffix of ignored keys: files of older batch norms lack them, and nothing uses them."""


class LoadedNetwork(NamedTuple):
    """Network with its weights, on the CPU, and its description."""

    network: nn.Module
    classes: list[str]
    """Class names in the order of their ids; numbers if unknown."""
    architecture: dict
    """Name, backbone and output_stride (None if patches fix it); and view_px if set."""


def load_network(
    path: str | Path, *, output_stride: int | None = None, view_px: int | None = None,
    class_names: Sequence[str] = ()
) -> LoadedNetwork:
    """Loads the network of a checkpoint: of a training run, or a state dict with the public keys of ST++,
    UniMatch or UniMatch V2.

    The network of a state dict is identified by its keys and shapes; wrappers and prefixes are as in
    `load_model`.

    Args:
        output_stride: output stride of a state dict, whose weights do not depend on it; None: that of all
            published networks on the backbone, if it is unique. A run's checkpoint records its own.
        view_px: longer side, in pixels, to which whole images are resized; None: as recorded in the
            checkpoint, else original size.
        class_names: class names for a state dict with the same number of classes.

    Raises:
        UserError: the file is invalid (see `read_checkpoint`), holds no such network, or one with another
            or an unknown stride.
    """
    content = read_checkpoint(path)
    view = {"view_px": view_px} if view_px else {}
    if "format" not in content:
        network, classes, architecture = _published(state_dict_of(content), path, output_stride, class_names)
        return LoadedNetwork(network, classes, architecture | view)
    saved = checkpoint.require_own(content, path)
    try:
        architecture, classes = saved["architecture"], list(saved["classes"])
        _check_names(classes, saved["classes"])
        network = build_model(
            architecture["name"], architecture["backbone"], len(classes), architecture["output_stride"]
        )
        network.load_state_dict(saved["model"])
        view_recorded = architecture.get("view_px")
        if type(view_recorded) not in (int, type(None)):
            raise ValueError(f"view_px is {view_recorded!r}")
        check_view(view_recorded)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: holds no network of this version ({reason}); give a best.pt or third-*.pt"
        ) from None
    if output_stride not in (None, architecture["output_stride"]):
        stride_of(architecture["backbone"], output_stride)
        raise UserError(
            f"--output-stride {output_stride}: {path} was trained at {architecture['output_stride']}; leave "
            "the flag out"
        )
    network.pretrained = record_of(saved)
    return LoadedNetwork(network, classes, architecture | view)


def _check_names(classes: list, recorded: object) -> None:
    """Rejects class names that no run writes.

    Raises:
        ValueError: says why.
    """
    if not isinstance(recorded, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its class names are not text")
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"it has {len(classes)} classes; up to {MAX_CLASSES} are possible")
    if len(set(classes)) < len(classes) or not all(name.strip() and name.isprintable() for name in classes):
        raise ValueError("its class names are not distinct, or not printable")


def _published(
    state: dict[str, object], path: str | Path, output_stride: int | None, class_names: Sequence[str]
) -> LoadedNetwork:
    """Loads the network of a state dict."""
    name, backbone = _nearest(state, path)
    known = _known_shapes()[name, backbone]
    classifier = NETWORKS[name].make.classifier_name
    biases = [state[key] for key in sorted(known) if key.startswith(classifier) and key.endswith(".bias")]
    count = biases[0].numel() if isinstance(biases[0], Tensor) else 0
    if not 2 <= count <= MAX_CLASSES:
        raise UserError(f"{path}: its classifier has {count} classes; 2 to {MAX_CLASSES} are possible")
    requested = output_stride or BACKBONES[backbone].published_stride
    if requested is None and BACKBONES[backbone].output_stride is not None:
        raise UserError(
            f"{path}: {name} on {backbone}, by its keys, which do not determine the output stride; "
            f"give it with --output-stride ({BACKBONES[backbone].output_stride} is usual)"
        )
    stride = stride_of(backbone, requested)
    network = build_model(name, backbone, count, stride)
    load_state(network, state, path)
    note = f"; output stride {stride} (--output-stride sets it)" if stride else ""
    log.say(f"{path}: {name} on {backbone}, {count} classes, by its keys{note}")
    names = list(class_names) if len(class_names) == count else [str(i) for i in range(count)]
    return LoadedNetwork(network, names, {"name": name, "backbone": backbone, "output_stride": stride})


def _nearest(state: dict[str, object], path: str | Path) -> tuple[str, str]:
    """Name and backbone of the known network with the keys of a state dict; of several, with the nearest
    shapes.

    Raises:
        UserError: no known network has these keys.
    """
    in_file = {
        key: getattr(value, "shape", None) for key, value in state.items() if not key.endswith(UNCOUNTED)
    }

    def distance(shapes: dict[str, torch.Size]) -> tuple[int, int]:
        return len(shapes.keys() ^ in_file.keys()), sum(
            in_file.get(key) != shape for key, shape in shapes.items()
        )

    (name, backbone), nearest = min(_known_shapes().items(), key=lambda known: distance(known[1]))
    if nearest.keys() != in_file.keys():
        misfits = {
            "missing": sorted(nearest.keys() - in_file.keys()),
            "superfluous": sorted(in_file.keys() - nearest.keys()),
        }
        raise UserError(
            f"{path}: holds no known network; nearest is {name} on {backbone} "
            f"({named_keys(misfits)})"
        )
    return name, backbone


@functools.cache
def _known_shapes() -> dict[tuple[str, str], dict[str, torch.Size]]:
    """Shapes of state dicts by name and backbone, with classifiers for two classes."""
    with torch.device("meta"):  # shapes without memory
        networks = {
            (name, backbone): build_model(name, backbone, 2)
            for name in NETWORKS
            for backbone in NETWORKS[name].backbones
        }
    return {
        kind: {key: value.shape for key, value in network.state_dict().items() if not key.endswith(UNCOUNTED)}
        for kind, network in networks.items()
    }
