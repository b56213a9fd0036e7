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
        return torch.optim.SGD(groups, fused=True, **settings)
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError("--train.optimizer apex: NVIDIA apex is not installed (build it from its repository; the PyPI "
                        "package named apex is unrelated), or use --train.optimizer sgd") from None
    return FusedSGD(groups, **settings)
