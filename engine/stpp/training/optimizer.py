"""The optimiser of a run."""

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.adam import adam
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
    """A fused optimiser of PyTorch that on a CPU is given channels_last tensors in the order of the weight's
    memory.

    PyTorch 2.13 copies each of them to rows and back (six times the step of ResNet-18), and mixes numbers up
    where weight, gradient and state are not laid out alike. `self.found_inf`, a tensor on the device, passes
    over the step where it is not zero.
    """

    state_names: tuple[str, ...]
    """Tensors of the state that are shaped as their weight."""

    def _begin(self) -> None:
        # zeros: made by a first step that is passed over they would hold anything
        for weight in self._weights():
            self.state[weight] |= {name: torch.zeros_like(weight) for name in self.state_names}

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for weight in self._weights():
            state = self.state[weight]
            state |= {name: torch.empty_like(weight).copy_(state[name]) for name in self.state_names}

    @torch.no_grad()
    def step(self) -> None:
        """One step; passed over, on the device, where `self.found_inf` holds a tensor that is not zero."""
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
    """Fused AdamW, with the published betas 0.9 and 0.999."""

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
    """The permutation of its axes after which a dense tensor is contiguous."""
    return sorted(range(weight.ndim), key=weight.stride, reverse=True)


def step_unless(bad: torch.Tensor, optimizer: Optimizer) -> None:
    """One step, or none where `bad` (bool scalar on the device) holds; PyTorch's fused optimisers decide on
    the device."""
    if isinstance(optimizer, _InOrder):
        optimizer.grad_scale, optimizer.found_inf = None, bad.float()
        optimizer.step()
    elif not bad:  # apex cannot: one wait for the device a step
        optimizer.step()
