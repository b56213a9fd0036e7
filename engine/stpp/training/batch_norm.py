"""Batch-norm statistics recomputed on weakly augmented images: running averages follow strongly augmented
crops and weights of some steps ago, and a network is used on whole images as they are.

N images, H W crop size.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stpp import distributed
from stpp.distributed import World


@contextlib.contextmanager
def recalibrated(network: nn.Module, batches: Callable[[], Iterable[torch.Tensor]], here: World, *,
                 autocast: contextlib.AbstractContextManager) -> Iterator[None]:
    """Puts statistics of some images in place of the running averages, which come back at the end.

    A layer's statistics are the means over batches of their mean and variance, over all ranks. Layers that
    are frozen keep theirs.

    Args:
        network: left in the mode that it is in; dropout is off meanwhile.
        batches: makes this rank's images, float32 [N, 3, H, W], as many batches on every rank.
        here: this rank.
        autocast: the types to compute in.
    """
    was_training = network.training
    network.train()
    layers = [layer for layer in network.modules()
              if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.training]
    network.eval()
    kept = [([buffer.clone() for buffer in layer.buffers()], layer.momentum) for layer in layers]
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
                distributed.sum_over_ranks(statistics).div_(here.size)
            layer.eval()
        network.train(was_training)
        yield
    finally:
        for layer, (buffers, momentum) in zip(layers, kept, strict=True):
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)
            layer.momentum = momentum
        network.train(was_training)
