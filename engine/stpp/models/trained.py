"""Networks from checkpoints: those of a training run, and state dicts of others, which do not say what they
are."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stpp import checkpoint, log
from stpp.errors import UserError
from stpp.models.build import BACKBONES, NETWORKS, build_model, stride_of
from stpp.models.weights import load_state, named_keys, read_checkpoint, state_dict_of

MAX_CLASSES = 255
"""Ids that a mask holds besides 255, which is "ignore"."""
UNCOUNTED = ".num_batches_tracked"
"""Files of older batch norms lack these, and nothing uses them."""


class LoadedNetwork(NamedTuple):
    """A network with its weights, on the CPU, and what it is."""

    network: nn.Module
    classes: list[str]
    """Names in the order of their ids; numbers where they are not known."""
    architecture: dict
    """Its name, backbone and output_stride, which is None where patches fix it; and view_px where it sees
    whole images at another size than their own."""


def load_network(
    path: str | Path, *, output_stride: int | None = None, view_px: int | None = None,
    class_names: Sequence[str] = ()
) -> LoadedNetwork:
    """The network of a checkpoint: one of a training run, or a state dict with the public keys of ST++,
    UniMatch or UniMatch V2.

    What network a state dict is of is seen in its keys and shapes; wrappers and prefixes are as in
    `load_model`.

    Args:
        output_stride: of a state dict, whose weights do not depend on it; None: that of all published
            networks on such a backbone, if there is one. A run's checkpoint tells its own.
        view_px: longer side at which the network is to see whole images, pixels; None: as its checkpoint
            tells, or their own size.
        class_names: for a state dict of as many classes.

    Raises:
        UserError: the file is unfit (see `read_checkpoint`), holds no such network, a run's of another
            stride, or one whose stride nobody told.
    """
    content = read_checkpoint(path)
    seen = {"view_px": view_px} if view_px else {}
    if "format" not in content:
        network, classes, architecture = _published(state_dict_of(content), path, output_stride, class_names)
        return LoadedNetwork(network, classes, architecture | seen)
    saved = checkpoint.require_own(content, path)
    try:
        architecture, classes = saved["architecture"], list(saved["classes"])
        network = build_model(
            architecture["name"], architecture["backbone"], len(classes), architecture["output_stride"]
        )
        network.load_state_dict(saved["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: holds no network of this version ({reason}); give a best.pt or third-*.pt"
        ) from None
    if output_stride not in (None, architecture["output_stride"]):
        stride_of(architecture["backbone"], output_stride)
        raise UserError(
            f"--output-stride {output_stride}: {path} was trained at {architecture['output_stride']} and "
            "tells so; leave the flag out"
        )
    told = architecture.get("view_px")
    if not (told is None or type(told) is int and told > 0):
        raise UserError(f"{path}: holds no network of this version (view_px is {told!r}); give a best.pt or "
                        "third-*.pt")
    return LoadedNetwork(network, classes, architecture | seen)


def _published(
    state: dict[str, object], path: str | Path, output_stride: int | None, class_names: Sequence[str]
) -> LoadedNetwork:
    """The network of a state dict."""
    name, backbone = _nearest(state, path)
    known = _known_shapes()[name, backbone]
    classifier = NETWORKS[name].make.classifier_name
    biases = [state[key] for key in sorted(known) if key.startswith(classifier) and key.endswith(".bias")]
    count = biases[0].numel() if isinstance(biases[0], Tensor) else 0
    if not 2 <= count <= MAX_CLASSES:
        raise UserError(f"{path}: its classifier has {count} classes; 2 to {MAX_CLASSES} are possible")
    asked = output_stride or BACKBONES[backbone].published_stride
    if asked is None and BACKBONES[backbone].output_stride is not None:
        raise UserError(
            f"{path}: {name} on {backbone}, by its keys, which do not tell the output stride; "
            f"say it with --output-stride ({BACKBONES[backbone].output_stride} is usual)"
        )
    stride = stride_of(backbone, asked)
    network = build_model(name, backbone, count, stride)
    load_state(network, state, path)
    shown = f"; output stride {stride} (--output-stride sets it)" if stride else ""
    log.say(f"{path}: {name} on {backbone}, {count} classes, by its keys{shown}")
    names = list(class_names) if len(class_names) == count else [str(i) for i in range(count)]
    return LoadedNetwork(network, names, {"name": name, "backbone": backbone, "output_stride": stride})


def _nearest(state: dict[str, object], path: str | Path) -> tuple[str, str]:
    """Name and backbone of the known network with the keys of a state dict and, of several, with its shapes.

    Raises:
        UserError: none has these keys.
    """
    found = {
        key: getattr(value, "shape", None) for key, value in state.items() if not key.endswith(UNCOUNTED)
    }

    def distance(shapes: dict[str, torch.Size]) -> tuple[int, int]:
        return len(shapes.keys() ^ found.keys()), sum(
            found.get(key) != shape for key, shape in shapes.items()
        )

    (name, backbone), nearest = min(_known_shapes().items(), key=lambda known: distance(known[1]))
    if nearest.keys() != found.keys():
        misfits = {
            "missing": sorted(nearest.keys() - found.keys()),
            "superfluous": sorted(found.keys() - nearest.keys()),
        }
        raise UserError(
            f"{path}: holds no network that is known here; nearest is {name} on {backbone} "
            f"({named_keys(misfits)})"
        )
    return name, backbone


@functools.cache
def _known_shapes() -> dict[tuple[str, str], dict[str, torch.Size]]:
    """What a state dict has to hold, by name and backbone; the classifier is for two classes."""
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
