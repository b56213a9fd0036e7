"""Cases, forms and the three-way rule of the tests of the training operators: cross entropy and dilated
convolution.

The three-way rule compares with the truth (float64) and with eager PyTorch in the input's dtype: the error of
the fused form may be at most twice the error of eager, plus a tolerance from the one table below.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import stpp_kernels
from stpp_kernels import reference
from stpp_kernels.dispatch import triton_available

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(not triton_available() or torch.cuda.is_available(), reason="interpreter only")
)
FORMS = [
    "cpu",
    "reference",
    TRITON,
    pytest.param("cuda", marks=[pytest.mark.gpu,
                                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Tolerance of a result stored in this dtype, relative to the largest magnitude of the truth (at least 1):
half a unit of its last place for the 16-bit types, a few sums' rounding for float32."""
LOGIT_ULP = 8.0
"""Rounding of an interpolated logit in float32, in units of the last place of the largest logit."""


def assert_three_way(name: str, fused, eager, truth, slack: float = 0.0) -> None:
    """Asserts the three-way rule on one tensor, with `slack` (absolute) on top of the table; names the worst
    index."""
    assert fused.shape == truth.shape, (name, fused.shape, truth.shape)
    if not truth.numel():
        return
    scale = max(1.0, truth.abs().max().item())
    # PyTorch's own result may be NaN where the truth is finite (depthwise weight gradients of oneDNN in
    # bf16): there the bound is that of the truth, rounded once.
    eager = torch.where(eager.isnan() & ~truth.isnan(), truth.to(eager.dtype), eager)
    error, eager_error = ((other.double() - truth).abs() for other in (fused, eager))
    allowed = 2 * eager_error.max().item() + TOLERANCE[fused.dtype] * scale + slack
    worst = error.max().item()
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.ndim else ()
    assert worst <= allowed, (
        f"{name}: error {worst:.3g} at {index} (fused {fused[index].item():.8g}, truth "
        f"{truth[index].item():.8g}), eager's largest error {eager_error.max().item():.3g}, allowed "
        f"{allowed:.3g}"
    )


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Copies the values into a layout: `contiguous`, `channels_last`, or a `sliced` view with a stride of 2
    along width and an offset."""
    if layout == "sliced":
        n, c, h, w = tensor.shape
        view = torch.full((n, c + 1, h + 2, 2 * w + 1), 777.0, dtype=tensor.dtype,
                          device=tensor.device)[:, 1:, 1:-1, 1::2]
        return view.copy_(tensor)
    return tensor.contiguous(memory_format=torch.channels_last if layout == "channels_last"
                             else torch.contiguous_format)


@dataclass(frozen=True)
class LossCase:
    """One draw: logits [n, c, *source], labels [n, *size], and their properties."""

    n: int
    c: int
    source: tuple[int, int]
    size: tuple[int, int]
    dtype: torch.dtype
    label_dtype: torch.dtype
    layout: str
    magnitude: float
    ignored: float
    weighted: bool
    seed: int

    def tensors(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Returns (logits, labels with 255 where ignored, keyword arguments of the loss)."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.n, self.c, *self.source, generator=generator) * self.magnitude
        logits = logits.clamp(-1e4, 1e4).to(self.dtype)
        labels = torch.randint(min(self.c, 255), (self.n, *self.size), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < self.ignored] = 255
        weights = {}
        if self.weighted:
            weights["class_weight"] = torch.rand(self.c, generator=generator).to(device)
            weights["pixel_weight"] = (torch.rand(labels.shape, generator=generator) * 2).to(device)
        return laid_out(logits.to(device), self.layout), labels.to(self.label_dtype).to(device), weights

    def slack(self) -> float:
        """Bounds the effect of float32 rounding of the interpolated logits on the gradient of one
        low-resolution logit."""
        (h, w), (height, width) = self.source, self.size
        pixels = min(height, 2 * height / h + 2) * min(width, 2 * width / w + 2)
        return LOGIT_ULP * torch.finfo(torch.float32).eps * self.magnitude * pixels


def loss_cases(form: str) -> st.SearchStrategy[LossCase]:
    """Draws cases; small ones for the Triton interpreter."""
    small = form == "triton"
    length = st.one_of(st.just(1),
                       st.integers(1, 9)) if small else st.one_of(st.just(1), st.integers(1, 40), st.just(65))
    side = st.tuples(length, length)
    return st.builds(
        LossCase,
        n=st.integers(1, 2 if small else 3),
        c=st.sampled_from([2, 3, 19, 21] if small else [1, 2, 19, 21, 150, 256]),
        source=side,
        size=side,
        dtype=st.sampled_from(DTYPES),
        label_dtype=st.sampled_from([torch.uint8, torch.int64]),
        layout=st.sampled_from(LAYOUTS),
        magnitude=st.sampled_from([0.1, 3.0, 100.0, 1e4]),
        ignored=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
        weighted=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )


def device_of(form: str) -> str:
    return "cuda" if form == "cuda" else "cpu"


def fused_loss(form: str, logits, labels, *, ignore_index=255, class_weight=None, pixel_weight=None):
    """Returns (loss sum, counted, gradient of the loss sum in the logits' dtype) of one form."""
    if form in ("cpu", "cuda"):
        leaf = logits.detach().requires_grad_()
        loss, counted = stpp_kernels.upsample_cross_entropy(
            leaf, labels, ignore_index=ignore_index, class_weight=class_weight, pixel_weight=pixel_weight
        )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), counted, gradient
    function = reference.upsample_cross_entropy
    if form == "triton":
        from stpp_kernels.triton.cross_entropy import upsample_cross_entropy as function
    loss, counted, gradient = function(logits, labels, class_weight, pixel_weight, ignore_index, True)
    return loss, counted, gradient.to(logits.dtype)


def eager_loss(logits, labels, *, ignore_index=255, class_weight=None, pixel_weight=None, compute=None):
    """Computes the same by F.interpolate in `compute` (default: the logits' dtype, as under autocast) and
    F.cross_entropy."""
    leaf = logits.detach().to(compute or logits.dtype).requires_grad_()
    full = F.interpolate(leaf, labels.shape[1:], mode="bilinear", align_corners=True)
    full = full if full.dtype == torch.float64 else full.float()
    target = torch.where(labels == ignore_index, -100, labels.long())
    weight = None if class_weight is None else class_weight.to(full.dtype)
    loss = F.cross_entropy(full, target, weight=weight, ignore_index=-100, reduction="none")
    loss = (loss if pixel_weight is None else loss * pixel_weight.to(full.dtype)).sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]
