"""Which backend `auto` takes: the one that is done first, compiling included.

The choice must be the same on every rank and again when a run goes on, or the labels would depend on it. So
nothing is timed: it follows from the network's arithmetic, the amount of work, the kind of device and the
number of cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from stpp.inference import export
from stpp_kernels import flops


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a predictor is opened for."""

    images: int | None
    """None: unknown."""
    views: float = 1.0
    """Area that the network sees of an image, over the image's: 1; 2 with the mirror image; 16.1 for ST++'s
    ten views."""
    image_px: int = 360 * 480
    """Pixels of an image, about."""
    predictors: int = 1
    """Predictors of this architecture in the run, which can share one engine."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What is assumed of a backend."""

    compile_s: float
    speedup: float
    """Over eager in half precision."""
    speedup_fp32: float
    """Over eager in float32."""
    shared: bool = False
    """Whether one compile serves all predictors of a run."""


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
"""By kind of device: (backend, frozen) -> cost. CPU: measured (docs/engines.md). CUDA: estimates until they
are measured."""
EAGER_FLOPS = {"cpu": {"fp32": 1.2e11, "bf16": 5e11}, "cuda": {"fp32": 3e13, "bf16": 2.8e14, "fp16": 2.8e14}}
"""Operations a second of the eager network, by precision: of one core (bf16: of one with AMX), of one GPU.

CUDA: estimates, from the bytes and operations of ResNet-50 on an H100. A row of `bench_teacher.py` replaces
them: nominal operations of an image times images a second.
"""


def flop_per_px(network: nn.Module, side: int = 321) -> float:
    """Operations (two for a multiplication and addition) per input pixel; nothing is computed."""
    shell = export.plain_copy(network).to("meta").eval()
    with torch.no_grad(), flops.counter() as counted:
        shell(torch.empty(1, 3, side, side, device="meta", dtype=next(shell.parameters()).dtype))
    return counted.get_total_flops() / side**2


def fastest(present: Sequence[str], kind: str) -> str:
    """The backend with the best speed on a kind of device, compiling not counted; eager where there is no
    other."""
    speeds = {backend: max(cost.speedup, cost.speedup_fp32) for (backend, _),
              cost in COSTS[kind].items() if backend in present}
    return max(speeds, key=speeds.get, default="eager")


def pick(network: nn.Module, work: Work, *, present: Sequence[str], kind: str, precision: str,
         cores: int) -> tuple[str, bool, str]:
    """Backend, whether frozen, and why, in words.

    Args:
        network: any network; it is not run.
        present: backends that can be used here, besides eager.
        kind: "cpu" or "cuda".
        precision: fp32, bf16 or fp16.
        cores: of a CPU, that this process uses.
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
            f"about {compile_s:.0f} s to compile, {seconds:.0f} s in all, against {eager_s:.0f} s of eager",
        )
    if not present:
        return "eager", False, "no compiler is installed for this device"
    best, _ = min((total, key) for key, total in totals.items() if key[0] != "eager")
    return "eager", False, f"about {eager_s:.0f} s of work; compiling would make it {best[0]:.0f} s"


def is_frozen(backend: str, network: nn.Module, work: Work, *, kind: str, precision: str, cores: int) -> bool:
    """Whether a backend that was asked for is to have the weights in its code: the form that is done first.

    Where the amount of work is not known, or only one form exists, it has.
    """
    if work.images is None:
        return True
    _, totals = _seconds(network, work, [backend], kind, precision, cores)
    return min(totals, key=lambda key: totals[key][0])[1] if totals else True


def _seconds(network: nn.Module, work: Work, backends: Sequence[str], kind: str, precision: str,
             cores: int) -> tuple[float, dict[tuple[str, bool], tuple[float, float]]]:
    """Seconds of the work by eager; and, by (backend, frozen), those in all and those of them that
    compile."""
    flop = flop_per_px(network) * work.images * work.views * work.image_px
    eager_s = flop / (EAGER_FLOPS[kind][precision] * (cores if kind == "cpu" else 1))
    totals = {}
    for (backend, frozen), cost in COSTS[kind].items():
        if backend in backends:
            compile_s = cost.compile_s / (work.predictors if cost.shared else 1)
            speedup = cost.speedup_fp32 if precision == "fp32" else cost.speedup
            totals[backend, frozen] = (compile_s + eager_s / speedup, compile_s)
    return eager_s, totals
