"""The optimiser of a run."""

import torch
from torch import nn
from torch.optim import Optimizer

from stpp.config import TrainConfig
from stpp.errors import UserError

REFERENCE_BATCH = 16
"""Global batch that `--train.lr` is meant for."""


def make_optimizer(backbone: list[nn.Parameter], head: list[nn.Parameter], train: TrainConfig, *,
                   default_multiplier: float) -> Optimizer:
    """Fused SGD over two groups, each with its `base_lr` before the schedule.

    Args:
        default_multiplier: learning rate of the head over that of the backbone where the recipe names none.

    Raises:
        UserError: apex asked for, and missing or not NVIDIA's.
    """
    base_lr = train.lr * train.batch_global / REFERENCE_BATCH
    multiplier = default_multiplier if train.head_lr_multiplier is None else train.head_lr_multiplier
    groups = [{"params": backbone, "base_lr": base_lr}, {"params": head, "base_lr": base_lr * multiplier}]
    settings = {"lr": base_lr, "momentum": train.momentum, "weight_decay": train.weight_decay}
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, fused=True, **settings)
        for weight in (*backbone, *head):  # zeros: made by a first step that is passed over they would hold anything
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return sgd
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError("--train.optimizer apex: NVIDIA apex is not installed (build it from its repository; the PyPI "
                        "package named apex is unrelated), or use --train.optimizer sgd") from None
    return FusedSGD(groups, **settings)


def step_unless(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """One step, or none where `bad` (bool scalar on the device) holds; PyTorch's fused SGD decides on the device."""
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
    elif not bad:  # apex cannot: one wait for the device a step
        optimizer.step()
