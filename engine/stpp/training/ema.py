"""Exponential moving average (EMA) of a network's weights, in float32."""

import copy

import torch
from torch import nn

from stpp import distributed


class MovingAverage(nn.Module):
    """Network whose weights and statistics are averages of another's; always in evaluation mode, not trained.

    After step t, counted from 0, average = a average + (1 - a) network with a = min(1 - 1 / (t + 1), decay):
    the first step copies the network. Integers, for example batch norm's counter, are copied.

    Args:
        network: initial network; copied.
        decay: maximum of a, below 1.

    Source: UniMatch-V2 (arXiv 2410.10777).
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.network(images_NCHW)

    def train(self, mode: bool = True) -> "MovingAverage":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Updates the average with the weights of `network` after optimiser step number `step`, in one fused
        call that does not wait for the device.

        Batch-norm statistics, which differ between ranks, are broadcast from rank 0: all ranks label alike,
        and training resumed from a checkpoint is bitwise identical.
        """
        decay = min(1 - 1 / (step + 1), self.decay)
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [weight for _, weight in floating],
                             1 - decay)
        for average, weight in pairs:
            if not average.is_floating_point():
                average.copy_(weight)
        distributed.broadcast_buffers(self.network)
