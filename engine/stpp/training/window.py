"""The last few steps of training, read from the device once for all of them."""

import dataclasses
import math
import time
from collections.abc import Sequence

import torch

from stpp import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """What a window's steps were like, over all ranks."""

    terms: dict[str, float]
    """Mean of each term of the loss over the steps that were finite, by its key."""
    loss: float
    """Mean of the weighted sum of the terms."""
    data_wait_pct: float
    """Share of the time spent waiting for data."""
    step_s: float
    nonfinite: list[int]
    """Steps, counted from 0, whose loss or gradient was not finite."""


class Window:
    """Terms of the loss and time of the last few steps."""

    def __init__(self):
        self._wait_s, self._since = 0.0, time.monotonic()
        self._terms_T: list[torch.Tensor] = []
        self._nonfinite: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._terms_T)

    def add(self, terms_T: torch.Tensor, nonfinite: torch.Tensor, wait_s: float) -> None:
        """Counts one step: what `Trainer.train_step` returned, and the seconds that it waited for data."""
        self._terms_T.append(terms_T)
        self._nonfinite.append(nonfinite)
        self._wait_s += wait_s

    def close(self, step: int, weights: dict[str, float] | Sequence[tuple[str, float]]) -> Interval:
        """The steps of the window, of which `step` would be the next; `weights` name the terms."""
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
