"""Recomputation of batch-norm statistics on weakly augmented images: running averages follow strongly
augmented crops and older weights, but the network is applied to whole, plain images.

N images, H W crop size.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stpp import distributed
from stpp.distributed import World


def _active(network: nn.Module) -> list[_BatchNorm]:
    """Lists the layers whose running averages a forward pass changes."""
    return [layer for layer in network.modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.training]


class Statistics:
    """Copy of the running averages that a network's forward pass changes."""

    def __init__(self, network: nn.Module):
        self._buffers = [statistics for layer in _active(network)
                         for statistics in (layer.running_mean, layer.running_var)]
        self._saved = torch.cat(self._buffers) if self._buffers else None

    def restore(self, bad: torch.Tensor) -> None:
        """Writes the copy back if `bad` (bool scalar on the device) is True, without waiting for it."""
        if self._saved is not None:
            values = torch.where(bad, self._saved, torch.cat(self._buffers))
            torch._foreach_copy_(self._buffers, list(values.split([len(one) for one in self._buffers])))


@contextlib.contextmanager
def recalibrated(network: nn.Module, batches: Callable[[], Iterable[torch.Tensor]], world: World, *,
                 autocast: contextlib.AbstractContextManager) -> Iterator[None]:
    """Replaces the running averages by statistics of some images inside the block, and restores them after.

    A layer's statistics are the averages of its batches' means and variances, over all ranks. Frozen layers
    are not changed.

    Args:
        network: its mode is kept; dropout is off during the recomputation.
        batches: makes this rank's images, float32 [N, 3, H, W]; the same number of batches on every rank.
        world: this rank.
        autocast: autocast context to compute in.
    """
    was_training = network.training
    network.train()
    layers = _active(network)
    network.eval()
    saved = [([buffer.clone() for buffer in layer.buffers()], layer.momentum) for layer in layers]
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over batches
            layer.train()
        with torch.no_grad(), autocast:
            for images_NCHW in batches():
                network(images_NCHW)
        for layer in layers:
            for statistics in (layer.running_mean, layer.running_var):
                distributed.sum_over_ranks(statistics).div_(world.size)
            layer.eval()
        network.train(was_training)
        yield
    finally:
        for layer, (buffers, momentum) in zip(layers, saved, strict=True):
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)
            layer.momentum = momentum
        network.train(was_training)
