"""Optimiser against PyTorch's plain one, for any layout of weights, gradients and momentum."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stpp.config import TrainConfig
from stpp.errors import UserError
from stpp.training.optimizer import SGD, make_optimizer

SETTINGS = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
LAYOUTS = {"rows": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(8, 4, 3, 3), (5, 3, 1, 1), (6, 1, 3, 3), (1, 7, 3, 3), (7,)]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[layout]) if tensor.ndim == 4 else tensor


def weights_of(shapes: list, layout: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(laid_out(torch.randn(shape, generator=generator), layout)) for shape in shapes]


@settings(deadline=None)  # the first step imports a part of PyTorch
@given(ours=st.sampled_from(sorted(LAYOUTS)), gradients=st.sampled_from(sorted(LAYOUTS)),
       loaded=st.sampled_from(sorted(LAYOUTS)),
       shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), without_gradient=st.integers(0, 4))
def test_steps_equal_plain_sgd(ours, gradients, loaded, shapes, without_gradient):
    weights, plain_weights = weights_of(shapes, ours), weights_of(shapes, "rows")
    optimizer, plain = SGD([{"params": weights}], **SETTINGS), torch.optim.SGD(plain_weights, **SETTINGS)
    for step in range(3):
        for number, (weight, plain_weight) in enumerate(zip(weights, plain_weights, strict=True)):
            plain_weight.grad = torch.randn(weight.shape) if number != without_gradient else None
            weight.grad = None if plain_weight.grad is None else laid_out(plain_weight.grad, gradients)
        optimizer.step()
        plain.step()
        for weight, plain_weight in zip(weights, plain_weights, strict=True):
            torch.testing.assert_close(weight, plain_weight)
        if step == 0:  # as if resumed from a checkpoint with momentum of another layout
            saved = optimizer.state_dict()
            for state in saved["state"].values():
                state["momentum_buffer"] = laid_out(state["momentum_buffer"], loaded)
            optimizer.load_state_dict(saved)


def test_skipped_step_changes_nothing():
    weights = weights_of(SHAPES, "channels_last")
    optimizer = SGD([{"params": weights}], **SETTINGS)
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.full_like(weight, float("nan"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(weight, then) for weight, then in zip(weights, before, strict=True))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_unrelated_apex_is_not_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    with pytest.raises(UserError, match="--train.optimizer apex"):
        optimizer_of(TrainConfig(optimizer="apex"))


def optimizer_of(config: TrainConfig) -> torch.optim.Optimizer:
    return make_optimizer(list(nn.Linear(2, 2).parameters()), list(nn.Linear(2, 2).parameters()), config,
                          default_multiplier=10.0)


def test_the_head_learns_faster():
    backbone, head = optimizer_of(TrainConfig(lr=0.001, batch_global=32)).param_groups
    assert (backbone["base_lr"], head["base_lr"]) == pytest.approx((0.002, 0.02))
    backbone, head = optimizer_of(TrainConfig(lr=0.001, head_lr_multiplier=1.0)).param_groups
    assert backbone["base_lr"] == head["base_lr"] == pytest.approx(0.001)
