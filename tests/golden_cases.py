"""Weights and images given by a rule instead of chance, and the results of the public implementations on
them."""

import json
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "data" / "golden"
TOLERANCE = 1e-6
"""Tolerance relative to an output's standard deviation, in float64."""


def read(name: str) -> dict:
    """Reads the results of a public implementation: "unimatch_resnet50" or "unimatch_v2"."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def waves(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Returns values in [-1, 1] that differ from name to name, float64."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.7 * index + zlib.crc32(name.encode()) % 1000).reshape(tuple(shape))


def filled(network: nn.Module) -> nn.Module:
    """Fills every tensor of the network's state dict by the rule, in float64."""
    network = network.double()
    for name, tensor in network.state_dict().items():
        tensor.copy_(_value(name, tensor))
    return network


def _value(name: str, like: Tensor) -> Tensor:
    v = waves(name, like.shape)
    if not like.is_floating_point():
        return torch.zeros_like(like)
    if name.endswith("running_var"):
        return 1 + 0.5 * v * v
    if like.dim() == 1:
        return 1 + 0.1 * v if name.endswith(("weight", "gamma")) else 0.1 * v
    if like.dim() == 3:
        return 0.1 * v
    return v * math.sqrt(2 / like[0].numel())


def assert_gives(output: Tensor, expected: dict) -> None:
    """Asserts that shape, mean, deviation and some values of an output are the recorded ones."""
    assert list(output.shape) == expected["shape"]
    tolerance = TOLERANCE * expected["std"]
    assert abs(output.mean().item() - expected["mean"]) <= tolerance
    assert abs(output.std(unbiased=False).item() - expected["std"]) <= tolerance
    values = torch.tensor(expected["values"], dtype=torch.float64)
    assert (
        output.flatten()[expected["flat_indices"]] - values
    ).abs().max() <= tolerance + 1e-9  # nine decimals are recorded
