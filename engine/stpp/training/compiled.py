"""Regional compilation: `torch.compile` of each block and head of a network, for training.

Equal blocks share a graph, so compiling takes a fraction of the time of a whole network, and
DistributedDataParallel still sends gradients during the backward pass. State-dict keys, copies and
checkpoints are those of the plain network.
"""

import contextlib

import torch
from torch import nn

from stpp.config import TrainConfig
from stpp.device import has_cpp_compiler
from stpp.errors import UserError
from stpp.models.network import Network

MOST_GRAPHS = 64
"""Graphs for one kind of block. PyTorch's default of 8 is below the ten different blocks of a ResNet-50, and
further blocks would silently run uncompiled."""


def compile_regions(step: nn.Module) -> None:
    """Compiles the regions of all networks in `step` in place, at their first call.

    Crops have one size in a run, so shapes are static.

    Raises:
        UserError: there is no C++ compiler.
    """
    if not has_cpp_compiler():
        raise UserError("--train.compile needs a C++ compiler; install g++, or train without it")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for network in step.modules():
        if isinstance(network, Network):
            for region in network.regions():
                region.compile(dynamic=False)


def uncompiled(config: TrainConfig) -> contextlib.AbstractContextManager:
    """Runs networks uncompiled inside the block: validation meets many sizes, each a graph of its own."""
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()
