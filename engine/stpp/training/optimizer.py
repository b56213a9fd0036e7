"""Optimisers: fused SGD and AdamW, and apex's FusedSGD."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from stpp.config import TrainConfig
from stpp.errors import UserError

REFERENCE_BATCH = 16
"""Global batch size that `--train.lr` refers to."""


def make_optimizer(backbone: list[nn.Parameter], head: list[nn.Parameter], train: TrainConfig, *,
                   default_multiplier: float) -> Optimizer:
    """Makes the optimiser, with two parameter groups that hold their `base_lr` before the schedule.

    Args:
        default_multiplier: default ratio of the head's learning rate to the backbone's.

    Raises:
        UserError: apex is requested, but missing or not NVIDIA's.
    """
    base_lr = train.lr * train.batch_global / REFERENCE_BATCH
    multiplier = default_multiplier if train.head_lr_multiplier is None else train.head_lr_multiplier
    groups = [{"params": backbone, "base_lr": base_lr}, {"params": head, "base_lr": base_lr * multiplier}]
    common = {"lr": base_lr, "weight_decay": train.weight_decay}
    if train.optimizer == "sgd":
        return SGD(groups, momentum=train.momentum, **common)
    if train.optimizer == "adamw":
        return AdamW(groups, **common)
    try:
        from apex.optimizers import FusedSGD
    except ImportError:
        raise UserError("--train.optimizer apex: NVIDIA apex is not installed (build it from its repository; "
                        "the PyPI package named apex is unrelated), or use --train.optimizer sgd") from None
    return FusedSGD(groups, momentum=train.momentum, **common)


class _InOrder:
    """Fused PyTorch optimiser that, on a CPU, passes channels_last tensors in the memory order of the weight.

    PyTorch 2.13 copies each of them to row-major and back (six times the step time of ResNet-18), and
    permutes values if weight, gradient and state have different layouts. A step is skipped if
    `self.found_inf`, a tensor on the device, is not zero.
    """

    state_names: tuple[str, ...]
    """Names of state tensors with the shape of their weight."""

    def _begin(self) -> None:
        # zeros now: if the first step is skipped, PyTorch leaves the state uninitialised
        for weight in self._weights():
            self.state[weight] |= {name: torch.zeros_like(weight) for name in self.state_names}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for weight in self._weights():
            state = self.state[weight]
            state |= {name: torch.empty_like(weight).copy_(state[name]) for name in self.state_names}

    @torch.no_grad()
    def step(self) -> None:
        """Takes one step; skipped, on the device, if `self.found_inf` is not zero."""
        if any(weight.device.type != "cpu" for weight in self._weights()):
            super().step()
            return
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                in_order = [[tensor.permute(_memory_order(weight)).contiguous() for tensor in
                             (weight, weight.grad, *(self.state[weight][name] for name in self.state_names))]
                            for weight in weights]
                found_inf = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
                self._fused(group, weights, *map(list, zip(*in_order, strict=True)), **found_inf)

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]


class SGD(_InOrder, torch.optim.SGD):
    """Fused SGD."""

    state_names = ("momentum_buffer",)

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, fused=True, **settings)
        self._begin()

    def _fused(self, group: dict, _, *tensors: list[torch.Tensor], **found_inf) -> None:
        sgd(*tensors, fused=True, has_sparse_grad=False, **found_inf,
            **{name: group[name]
               for name in ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")})


class AdamW(_InOrder, torch.optim.AdamW):
    """Fused AdamW with betas 0.9 and 0.999."""

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: list[dict], **settings):
        super().__init__(groups, fused=True, **settings)
        for weight in self._weights():
            self.state[weight]["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        self._begin()

    def _fused(self, group: dict, weights: list[nn.Parameter], *tensors: list[torch.Tensor],
               **found_inf) -> None:
        beta1, beta2 = group["betas"]
        adam(*tensors, [], [self.state[weight]["step"] for weight in weights], fused=True, has_complex=False,
             foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, decoupled_weight_decay=True, **found_inf,
             **{name: group[name]
                for name in ("lr", "weight_decay", "eps", "maximize", "capturable", "differentiable")})


def _memory_order(weight: torch.Tensor) -> list[int]:
    """Permutation of axes that makes a dense tensor contiguous."""
    return sorted(range(weight.ndim), key=weight.stride, reverse=True)


def step_unless(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """Takes one step unless `bad` (bool scalar on the device) is True; PyTorch's fused optimisers decide on
    the device."""
    if isinstance(optimizer, _InOrder):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
    elif not bad:  # apex cannot decide on the device: one wait per step
        optimizer.step()
