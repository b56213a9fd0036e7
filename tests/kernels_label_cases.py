"""Cases shared by the tests of the labelling operators: argmax, softmax_accumulate, confusion.

A "form" (`kernels_cases.FORMS`) is one way to run an operator: `cpu` is the public function on this machine
(C++, or plain PyTorch if it was not built), `reference` the plain PyTorch form, `triton` the Triton kernels
interpreted on the CPU, `cuda` the public function on a GPU. Tests are parametrized with the forms and share
their code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import Phase, settings
from hypothesis import strategies as st

import stpp_kernels
from kernels_cases import DTYPES, LAYOUTS, LOGIT_ULP, laid_out
from stpp_kernels import reference

# No shrinking: it would take minutes in the interpreter, and the printed case is small anyway.
QUICK = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
PROBABILITY_TOLERANCE = 2e-6
"""Absolute tolerance of a softmax and two blends in float32, over at most 256 classes."""


def logit_tolerance(logits: torch.Tensor) -> float:
    """Largest difference of two fp32 evaluations of one blended logit."""
    return LOGIT_ULP * torch.finfo(torch.float32).eps * max(1.0, logits.float().abs().max().item())


def probability_tolerance(logits: torch.Tensor) -> float:
    """Largest difference of a softmax probability of blended logits, whose slope in the logits is at most
    1/2."""
    return PROBABILITY_TOLERANCE + logit_tolerance(logits)


@dataclass(frozen=True)
class Case:
    """One draw: logits of shape [n, c, h, w], output size, and the scaled size in between."""

    n: int
    c: int
    source: tuple[int, int]
    size: tuple[int, int]
    scaled: tuple[int, int]
    dtype: torch.dtype
    layout: str
    magnitude: float
    seed: int

    def logits(self, device: str = "cpu") -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.n, self.c, *self.source, generator=generator)
        values = (values * self.magnitude).clamp(-1e4, 1e4).to(self.dtype)
        return laid_out(values, self.layout).to(device)


def cases(form: str) -> st.SearchStrategy[Case]:
    """Draws cases; small ones for the Triton interpreter."""
    small = form == "triton"
    classes = [2, 3, 19] if small else [1, 2, 3, 19, 21, 150, 256]
    lengths = [st.just(1), st.integers(1, 6)] if small else [st.just(1), st.integers(1, 40), st.just(65)]
    side = st.tuples(st.one_of(*lengths), st.one_of(*lengths))
    return st.builds(
        Case,
        n=st.integers(1, 2),
        c=st.sampled_from(classes),
        source=side,
        size=side,
        scaled=side,
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(LAYOUTS),
        magnitude=st.sampled_from([0.1, 3.0, 100.0, 1e4]),
        seed=st.integers(0, 2**32 - 1),
    )


def argmax(form: str, logits, size, confidence=True):
    """Returns (mask, confidence) of one form."""
    if form == "triton":
        from stpp_kernels.triton.argmax import upsample_argmax

        return upsample_argmax(logits, list(size), confidence)
    if form == "reference":
        return reference.upsample_argmax(logits, size)
    return stpp_kernels.upsample_argmax(logits, size, confidence=confidence)


def accumulate(form: str, acc, logits, scaled_size, size, flip, pair=False) -> None:
    if form == "triton":
        from stpp_kernels.triton.softmax_accumulate import softmax_accumulate

        return softmax_accumulate(acc, logits, list(scaled_size), list(size), flip, pair)
    if form == "reference":
        from stpp_kernels.softmax_accumulate import _accumulate_reference

        return _accumulate_reference(acc, logits, list(scaled_size), list(size), flip, pair)
    return stpp_kernels.softmax_accumulate(acc, logits, scaled_size, size, flip, pair=pair)


def finalize(form: str, acc):
    if form == "triton":
        from stpp_kernels.triton.softmax_accumulate import finalize as interpreted

        return interpreted(acc)
    return reference.finalize(acc) if form == "reference" else stpp_kernels.finalize(acc)


def confusion(form: str, pred, target, num_classes, ignore_index=255, per_image=False, ignore_both=False):
    if form == "triton":
        from stpp_kernels.triton.confusion import confusion as interpreted

        return interpreted(pred, target, num_classes, ignore_index, per_image, ignore_both)
    if form == "reference":
        from stpp_kernels.confusion import _reference

        return _reference(pred, target, num_classes, ignore_index, per_image, ignore_both)
    if ignore_both:  # the operator's own argument: public only through pairwise_iou
        return torch.ops.stpp_kernels.confusion(pred, target, num_classes, ignore_index, per_image, True)
    return stpp_kernels.confusion(pred, target, num_classes, ignore_index=ignore_index, per_image=per_image)


def resized(logits: torch.Tensor, size) -> torch.Tensor:
    """Resizes bilinearly in eager mode, in the dtype of the logits."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=True)


def worst(values: torch.Tensor, truth: torch.Tensor) -> str:
    """Describes the largest difference of two tensors, for a failure's message."""
    error = (values.double() - truth.double()).abs()
    at = int(error.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
    return f"worst at {index}: {values.flatten()[at].item()!r} for {truth.flatten()[at].item()!r}"
