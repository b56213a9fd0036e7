"""A moving average of a network's weights, in float32 beside it."""

import copy

import torch
from torch import nn

from stpp import distributed


class MovingAverage(nn.Module):
    """Network whose weights and statistics follow those of another; always in evaluation mode, never trained.

    After step t, counted from 0, average = a average + (1 - a) network with a = min(1 - 1 / (t + 1), decay):
    the first step copies the network. Integers, such as batch norm's counter, are copied.

    Args:
        network: to start from; copied.
        decay: largest share of the average itself, below 1.

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
        """Takes in the weights of `network` after optimiser step number `step`; one fused call, no wait for
        the device.

        Statistics of batch norm, which each rank has of its own images, are those of rank 0 on all of them:
        every rank labels alike, and a checkpoint, which has these, goes on to the same bits.
        """
        kept = min(1 - 1 / (step + 1), self.decay)
        pairs = [(mine, theirs) for mine,
                 theirs in zip(self.network.state_dict().values(), network.state_dict().values(),
                                                        strict=True)]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floating], [theirs for _, theirs in floating], 1 - kept)
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)
        distributed.broadcast_buffers(self.network)
