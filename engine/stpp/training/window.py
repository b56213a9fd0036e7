"""Window of the last training steps, read from the device in one transfer."""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch

from stpp import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Statistics of a window's steps, over all ranks."""

    terms: dict[str, float]
    """Mean of each term of the loss over the finite steps, by key."""
    loss: float
    """Mean of the weighted sum of the terms."""
    data_wait_pct: float
    """Share of the time spent waiting for data."""
    step_s: float
    nonfinite: list[int]
    """Steps, counted from 0, whose loss or gradient was not finite."""


class Window:
    """Loss terms and times of the last steps."""

    def __init__(self):
        self._wait_s, self._since = 0.0, time.monotonic()
        self._terms_T: list[torch.Tensor] = []
        self._nonfinite: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._terms_T)

    def add(self, terms_T: torch.Tensor, nonfinite: torch.Tensor, wait_s: float) -> None:
        """Adds a step: the results of `Trainer.train_step`, and the seconds that it waited for data."""
        self._terms_T.append(terms_T)
        self._nonfinite.append(nonfinite)
        self._wait_s += wait_s

    def close(self, step: int, weights: dict[str, float] | Sequence[tuple[str, float]]) -> Interval:
        """Computes the statistics of the window.

        Args:
            step: number of the step after the window.
            weights: weights of the terms, by key.
        """
        weights = dict(weights)
        both = torch.cat([torch.stack(self._terms_T), torch.stack(self._nonfinite).float()[:, None]], dim=1)
        rows = distributed.sum_over_ranks(both).tolist()  # sync: the one wait for the device
        finite = [terms for *terms, flag in rows if not flag]
        means = [sum(values) / len(finite)
                 for values in zip(*finite, strict=True)] if finite else [math.nan] * len(weights)
        terms = dict(zip(weights, means, strict=True))
        spent = time.monotonic() - self._since
        return Interval(terms=terms,
                        loss=sum(weights[key] * value for key, value in terms.items() if weights[key]),
                        data_wait_pct=100 * self._wait_s / spent, step_s=spent / self.steps,
                        nonfinite=[step - self.steps + i for i, (*_, flag) in enumerate(rows) if flag])
