"""Profiling of training steps: a log line that names the bottleneck, and a trace on demand."""

import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from stpp import files, log
from stpp.distributed import World
from stpp.processes import OtherLoad

LEAST_S, LEAST_STEPS = 5.0, 50
"""Minimum time and steps for a verdict; shorter epochs are judged together, because the first steps of a
stage are not typical."""
DATA_SHARE, COMMUNICATION_SHARE = 0.05, 0.1
"""Minimum share of a step's time spent waiting for it to be bound by data or communication."""
SCATTER, LEAST_WINDOWS = 2.0, 10
"""Minimum ratio of slow to quick steps (last and first decile of windows) for scatter; minimum windows."""
ADVICE = {
    "data": "raise --data.threads, install DALI, or put the images on a faster disk",
    "communication": "give every rank cores or a GPU of its own; a larger --train.batch-global exchanges "
                     "gradients less often",
    "compute": "more GPUs; --train.precision bf16 where the device has it; a larger --model.output-stride; "
               "smaller crops",
}
"""Advice for shorter steps, by bottleneck."""
WARM_UP, TRACED = 10, 5
"""Steps of a stage before its trace, and steps in the trace."""
FORWARD = "stpp.forward"
PARTS = {"forward": FORWARD, "loss": "stpp_kernels::upsample_cross_entropy",
         "backward": "autograd::engine::evaluate_function",
         "optimizer": "Optimizer.step"}
"""Parts of a step, with the prefix of their event names in a trace."""
OPERATORS = 25
"""Maximum operators in the table."""


class BottleneckMeter:
    """Meter that logs the bottleneck of the steps at the end of an epoch, whenever it changes."""

    def __init__(self, title: str, model: nn.Module, device: torch.device):
        self._title, self._model = title, model
        self._waited_s = self._spent_s = 0.0
        self._steps = 0
        self._logged_kind = ""
        self._load = OtherLoad() if device.type == "cpu" else None
        self._step_s: list[float] = []

    def add(self, steps: int, spent_s: float, data_wait_pct: float) -> None:
        """Adds the time of some steps, and the share of it spent waiting for data."""
        self._steps += steps
        self._spent_s += spent_s
        self._waited_s += spent_s * data_wait_pct / 100
        if self._load is not None:
            self._step_s.append(spent_s * (1 - data_wait_pct / 100) / steps)

    def end_epoch(self) -> None:
        """Logs the bottleneck of the epoch."""
        if self._spent_s < LEAST_S or self._steps < LEAST_STEPS:
            return
        data, communication = self._waited_s / self._spent_s, communication_share(self._model)
        kind = ("data" if data >= max(DATA_SHARE, communication) else
                "communication" if communication >= COMMUNICATION_SHARE else "compute")
        if kind != self._logged_kind:
            exchange = f", {100 * communication:.0f} % for gradients of other ranks" if communication else ""
            log.say(f"  {self._title}: bound by {kind}: {100 * data:.0f} % of a step waits for "
                    f"data{exchange}; to make it shorter: {ADVICE[kind]}")
        self._logged_kind, self._steps, self._waited_s, self._spent_s = kind, 0, 0.0, 0.0
        self._log_scatter()

    def _log_scatter(self) -> None:
        """Logs once that step times on a CPU scatter, with the number of cores that other processes use."""
        if self._load is None or len(self._step_s) < LEAST_WINDOWS:
            return
        quick, *_, slow = statistics.quantiles(self._step_s, n=10)
        cause = self._load.cause()
        if slow > SCATTER * quick:
            log.say(f"  {self._title}: steps take {1000 * quick:.0f} to {1000 * slow:.0f} ms{cause}; "
                    "OMP_NUM_THREADS=1 or fewer --data.threads may be faster (docs/performance.md)")
            self._load = None
        self._step_s.clear()


def communication_share(model: nn.Module) -> float:
    """Share of a step in which gradients are exchanged without overlapping computation, as sampled by
    DistributedDataParallel; 0 for one rank."""
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    sampled = model._get_ddp_logging_data()
    forward, backward, exchange, overlap = (sampled.get(f"avg_{name}_time", 0) for name in (
        "forward_compute", "backward_compute", "backward_comm", "backward_compute_comm_overlap"))
    alone = max(exchange - overlap, 0)
    return alone / max(forward + backward + alone, 1)


class Profile:
    """Profiler of a few steps of a stage: writes `trace-rank<i>.json.gz`, for chrome://tracing and Perfetto,
    and `parts.txt`.

    Args:
        folder: folder of the trace; created when the trace is written.
        model: network that is called in every step.
    """

    def __init__(self, folder: Path, world: World, model: nn.Module, title: str):
        self._folder, self._world, self._model, self._title = folder, world, model, title
        self._cuda = world.device.type == "cuda"
        self._waited_s, self._marks = 0.0, []

    def __enter__(self):
        self._open: list[record_function] = []
        self._hooks = (self._model.register_forward_pre_hook(self._begin),
                       self._model.register_forward_hook(self._end))
        self._profile = profile(
            activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda,
            schedule=torch.profiler.schedule(wait=WARM_UP - 2, warmup=2, active=TRACED, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.__enter__()
        return self

    def step(self, wait_s: float) -> None:
        """Ends a step that waited `wait_s` seconds for its data."""
        if self._cuda and WARM_UP <= self._profile.step_num + 1 <= WARM_UP + TRACED:
            torch.cuda.synchronize()
        if self._profile.step_num >= WARM_UP:
            self._waited_s += wait_s
        self._marks.append(time.perf_counter())
        self._profile.step()

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()
        self._profile.__exit__(None, None, None)
        if len(self._marks) < WARM_UP + TRACED:
            log.say(f"  {self._title}: too few steps were left for a profile ({len(self._marks)}; it needs "
                    f"{WARM_UP + TRACED})")

    def __deepcopy__(self, memo: dict):
        """Returns itself: copies of the network, as validation makes them, copy its hooks."""
        return self

    def _begin(self, module: nn.Module, *_):
        if not module.training:
            return
        self._open.append(record_function(FORWARD))
        self._open[-1].__enter__()

    def _end(self, module: nn.Module, *_):
        if not module.training:
            return
        self._open.pop().__exit__(None, None, None)

    def _write(self, traced: profile) -> None:
        if len(self._marks) < WARM_UP + TRACED:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"trace-rank{self._world.rank}.json.gz"
        temporary = path.with_name(f".{path.name}")
        traced.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        if self._world.is_main:
            files.write_text(self._folder / "parts.txt", self._table(traced))
            log.say(f"  {self._title}: profile of {TRACED} steps in {self._folder}")

    def _table(self, traced: profile) -> str:
        total_ms = 1000 * (self._marks[WARM_UP + TRACED - 1] - self._marks[WARM_UP - 1]) / TRACED
        where = "device" if self._cuda else "host"
        events = traced.events()
        part_ms = {"data wait": 1000 * self._waited_s / TRACED}
        for part, name in PARTS.items():
            outermost = [event for event in events if event.name.startswith(name)
                         and not (event.cpu_parent and event.cpu_parent.name.startswith(name))]
            us = sum(event.device_time_total if self._cuda else event.cpu_time_total for event in outermost)
            part_ms[part] = us / 1000 / TRACED
        part_ms["rest"] = total_ms - sum(part_ms.values())
        rows = [("part", f"ms on the {where}", "share")]
        rows += [(part, f"{ms:.2f}", f"{100 * ms / total_ms:.0f} %") for part, ms in part_ms.items()]
        by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        return (
            f"{self._title}: {TRACED} steps after {WARM_UP}, {total_ms:.2f} ms each; "
            "data wait is measured on the host\n\n"
            + log.table(rows)
            + "\n\n"
            + traced.key_averages().table(sort_by=by, row_limit=OPERATORS)
            + "\n"
        )
