"""Choice of the backend for `auto`: the one expected to finish first, compile time included.

The choice must be the same on every rank and after a resume, or the labels would depend on it. So nothing is
timed: it follows from the network's FLOPs, the amount of work, the kind of device and the number of cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stpp.inference import export
from stpp_kernels import flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """Amount of work of a predictor."""

    images: int | None
    """Number of images; None: unknown."""
    views: float = 1.0
    """Area of all views relative to the image: 1; 2 with the mirror image; 16.1 for ST++'s ten views."""
    image_px: int = 360 * 480
    """Typical pixels of an image."""
    predictors: int = 1
    """Predictors of this architecture in the run, which may share one engine."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Assumed cost of a backend."""

    compile_s: float
    speedup: float
    """Speedup over eager in half precision."""
    speedup_fp32: float
    """Speedup over eager in float32."""
    shared: bool = False
    """True if one compile serves all predictors of a run."""


COSTS: dict[str, dict[tuple[str, bool], Cost]] = {
    "cpu": {
        ("inductor", False): Cost(compile_s=50, speedup=1.17, speedup_fp32=1.07, shared=True),
        ("inductor", True): Cost(compile_s=45, speedup=1.45, speedup_fp32=1.15),
    },
    "cuda": {
        ("inductor", False): Cost(compile_s=60, speedup=1.2, speedup_fp32=1.1, shared=True),
        ("tensorrt", True): Cost(compile_s=120, speedup=1.8, speedup_fp32=1.3),
        ("torch-tensorrt", True): Cost(compile_s=180, speedup=1.7, speedup_fp32=1.2),
    },
}
"""Cost by device type and (backend, frozen). CPU: measured (docs/engines.md). CUDA: estimates until
measured."""
EAGER_FLOPS = {"cpu": {"fp32": 1.2e11, "bf16": 5e11}, "cuda": {"fp32": 3e13, "bf16": 2.8e14, "fp16": 2.8e14}}
"""FLOP/s of the eager network by precision: per core (bf16: with AMX), or per GPU.

CUDA: estimates, from the bytes and FLOPs of ResNet-50 on an H100. To replace them, multiply the nominal FLOPs
of an image by the images per second of `bench_teacher.py`.
"""


def flop_per_px(network: nn.Module, side: int = 321) -> float:
    """Counts FLOPs (two per multiply-add) per input pixel, without computing anything."""
    shell = export.plain_copy(network).to("meta").eval()
    with torch.no_grad(), flops.counter() as counted:
        shell(torch.empty(1, 3, side, side, device="meta", dtype=next(shell.parameters()).dtype))
    return counted.get_total_flops() / side**2


def fastest(present: Sequence[str], kind: str) -> str:
    """Returns the backend with the highest throughput on a device type, ignoring compile time; eager if there
    is no other."""
    speeds = {backend: max(cost.speedup, cost.speedup_fp32) for (backend, _),
              cost in COSTS[kind].items() if backend in present}
    return max(speeds, key=speeds.get, default="eager")


def pick(network: nn.Module, work: Work, *, present: Sequence[str], kind: str, precision: str,
         cores: int) -> tuple[str, bool, str]:
    """Chooses the backend for an amount of work.

    Args:
        network: any network; it is not run.
        present: backends available on this machine, besides eager.
        kind: "cpu" or "cuda".
        precision: fp32, bf16 or fp16.
        cores: CPU cores that this process uses.

    Returns:
        (backend, frozen, reason in words).
    """
    if work.images is None:
        return "eager", False, "the number of images is not known"
    eager_s, totals = _seconds(network, work, present, kind, precision, cores)
    totals["eager", False] = (eager_s, 0.0)
    backend, frozen = min(totals, key=lambda key: totals[key][0])
    seconds, compile_s = totals[backend, frozen]
    if backend != "eager":
        return (
            backend,
            frozen,
            f"about {compile_s:.0f} s to compile, {seconds:.0f} s in total, against {eager_s:.0f} s in eager",
        )
    if not present:
        return "eager", False, "no compiler is installed for this device"
    best, _ = min((total, key) for key, total in totals.items() if key[0] != "eager")
    return "eager", False, f"about {eager_s:.0f} s of work; with compiling it would be {best[0]:.0f} s"


def is_frozen(backend: str, network: nn.Module, work: Work, *, kind: str, precision: str, cores: int) -> bool:
    """Decides if a requested backend compiles the weights into its code: True if that is expected to finish
    first, if the amount of work is unknown, or if there is no other form."""
    if work.images is None:
        return True
    _, totals = _seconds(network, work, [backend], kind, precision, cores)
    return min(totals, key=lambda key: totals[key][0])[1] if totals else True


def _seconds(network: nn.Module, work: Work, backends: Sequence[str], kind: str, precision: str,
             cores: int) -> tuple[float, dict[tuple[str, bool], tuple[float, float]]]:
    """Estimates the seconds of the work in eager; and, by (backend, frozen), the total and the compile
    time."""
    flop = flop_per_px(network) * work.images * work.views * work.image_px
    eager_s = flop / (EAGER_FLOPS[kind][precision] * (cores if kind == "cpu" else 1))
    totals = {}
    for (backend, frozen), cost in COSTS[kind].items():
        if backend in backends:
            compile_s = cost.compile_s / (work.predictors if cost.shared else 1)
            speedup = cost.speedup_fp32 if precision == "fp32" else cost.speedup
            totals[backend, frozen] = (compile_s + eager_s / speedup, compile_s)
    return eager_s, totals
