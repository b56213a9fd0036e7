"""Networks that a training run of this project left behind."""

from pathlib import Path

from torch import nn

from stpp import checkpoint
from stpp.errors import UserError
from stpp.models.build import build_model


def load_network(path: str | Path) -> tuple[nn.Module, list[str]]:
    """The network of a checkpoint written by a training run, and its class names.

    Raises:
        UserError: not such a checkpoint.
    """
    saved = checkpoint.load(path)
    try:
        architecture, classes = saved["architecture"], list(saved["classes"])
        network = build_model(architecture["name"], architecture["backbone"], len(classes),
                              architecture["output_stride"])
        network.load_state_dict(saved["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: holds no network of this version ({reason}); give a best.pt or third-*.pt") from None
    return network, classes
