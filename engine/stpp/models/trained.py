"""Networks from checkpoints: those of a training run, and state dicts of others, which do not say what they are."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stpp import checkpoint, log
from stpp.errors import UserError
from stpp.models.build import MODELS, build_model
from stpp.models.resnet import LAYOUTS
from stpp.models.weights import load_state, named_keys, read_checkpoint, state_dict_of

PUBLIC_STRIDE = 8
"""Output stride of the published ST++ networks. No weight depends on it, so no state dict tells it."""
MAX_CLASSES = 255
"""Ids that a mask holds besides 255, which is "ignore"."""
UNCOUNTED = ".num_batches_tracked"
"""Files of older batch norms lack these, and nothing uses them."""


class Trained(NamedTuple):
    """A network with its weights, on the CPU, and what it is."""

    network: nn.Module
    classes: list[str]
    """Names in the order of their ids; numbers where they are not known."""
    architecture: dict
    """Its name, backbone and output_stride."""


def load_network(path: str | Path, *, output_stride: int | None = None, class_names: Sequence[str] = ()) -> Trained:
    """The network of a checkpoint: one of a training run, or a state dict with the public keys, as those of ST++ are.

    What network a state dict is of is seen in its keys and shapes; wrappers and prefixes are as in `load_model`.

    Args:
        output_stride: of a state dict; None: 8, that of the published ST++ networks. A run's checkpoint tells its own.
        class_names: for a state dict of as many classes.

    Raises:
        UserError: the file is unfit (see `read_checkpoint`), holds no such network, or a run's of another stride.
    """
    content = read_checkpoint(path)
    if "format" not in content:
        return _published(state_dict_of(content), path, output_stride or PUBLIC_STRIDE, class_names)
    saved = checkpoint.ours(content, path)
    try:
        architecture, classes = saved["architecture"], list(saved["classes"])
        network = build_model(architecture["name"], architecture["backbone"], len(classes),
                              architecture["output_stride"])
        network.load_state_dict(saved["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: holds no network of this version ({reason}); give a best.pt or third-*.pt") from None
    if output_stride not in (None, architecture["output_stride"]):
        raise UserError(f"--output-stride {output_stride}: {path} was trained at {architecture['output_stride']} and tells so; "
                        "leave the flag out")
    return Trained(network, classes, architecture)


def _published(state: dict[str, object], path: str | Path, output_stride: int, class_names: Sequence[str]) -> Trained:
    """The network of a state dict."""
    found = {key for key in state if not key.endswith(UNCOUNTED)}
    (name, backbone), keys = min(_known_keys().items(), key=lambda known: len(known[1] ^ found))
    if keys != found:
        misfits = {"missing": sorted(keys - found), "superfluous": sorted(found - keys)}
        raise UserError(f"{path}: holds no network that is known here; nearest is {name} on {backbone} ({named_keys(misfits)})")
    classifier = MODELS[name].classifier_name
    biases = [state[key] for key in sorted(keys) if key.startswith(classifier) and key.endswith(".bias")]
    count = biases[0].numel() if isinstance(biases[0], Tensor) else 0
    if not 2 <= count <= MAX_CLASSES:
        raise UserError(f"{path}: its classifier has {count} classes; 2 to {MAX_CLASSES} are possible")
    network = build_model(name, backbone, count, output_stride)
    load_state(network, state, path)
    log.say(f"{path}: {name} on {backbone}, {count} classes, by its keys; output stride {output_stride} (--output-stride sets it)")
    names = list(class_names) if len(class_names) == count else [str(i) for i in range(count)]
    return Trained(network, names, {"name": name, "backbone": backbone, "output_stride": output_stride})


@functools.cache
def _known_keys() -> dict[tuple[str, str], frozenset[str]]:
    """What a state dict has to hold, by name and backbone."""
    with torch.device("meta"):  # shapes without memory
        networks = {(name, backbone): build_model(name, backbone, 2, PUBLIC_STRIDE) for name in MODELS for backbone in LAYOUTS}
    return {kind: frozenset(key for key in network.state_dict() if not key.endswith(UNCOUNTED))
            for kind, network in networks.items()}
