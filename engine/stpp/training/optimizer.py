"""The optimiser of a run."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

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
        return SGD(groups, **settings)
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError("--train.optimizer apex: NVIDIA apex is not installed (build it from its repository; the PyPI "
                        "package named apex is unrelated), or use --train.optimizer sgd") from None
    return FusedSGD(groups, **settings)


class SGD(torch.optim.SGD):
    """PyTorch's fused SGD, which on a CPU reads channels_last tensors where they lie.

    PyTorch 2.13 copies each of them to rows and back (six times the step of ResNet-18), and mixes numbers up where weight, gradient
    and momentum are not laid out alike. Here all three are handed over in the order of the weight's memory.
    """

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, fused=True, **settings)
        for weight in self._weights():  # zeros: made by a first step that is passed over they would hold anything
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for weight in self._weights():
            state = self.state[weight]
            state["momentum_buffer"] = torch.empty_like(weight).copy_(state["momentum_buffer"])

    @torch.no_grad()
    def step(self) -> None:
        """One step; passed over, on the device, where `self.found_inf` holds a tensor that is not zero."""
        if any(weight.device.type != "cpu" for weight in self._weights()):
            super().step()
            return
        for group in self.param_groups:
            tensors = [(weight, weight.grad, self.state[weight]["momentum_buffer"]) for weight in group["params"]
                       if weight.grad is not None]
            if not tensors:
                continue
            in_order = [[tensor.permute(_memory_order(weight)).contiguous() for tensor in (weight, gradient, momentum)]
                        for weight, gradient, momentum in tensors]
            sgd(*map(list, zip(*in_order, strict=True)), fused=True, has_sparse_grad=False,
                grad_scale=getattr(self, "grad_scale", None), found_inf=getattr(self, "found_inf", None),
                **{name: group[name] for name in ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")})

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]


def _memory_order(weight: torch.Tensor) -> list[int]:
    """The permutation of its axes after which a dense tensor is contiguous."""
    return sorted(range(weight.ndim), key=weight.stride, reverse=True)


def step_unless(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """One step, or none where `bad` (bool scalar on the device) holds; PyTorch's fused SGD decides on the device."""
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
    elif not bad:  # apex cannot: one wait for the device a step
        optimizer.step()
