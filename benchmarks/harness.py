"""Timing of alternating variants of one computation, and rows of results.

Variants alternate (A B A B ...) in one process after a warm-up, so a slow phase of the machine affects all of
them. Time: wall clock on a CPU, events on a GPU. Memory: in a separate run, the peak above the memory held
before (inputs and earlier results), from the kernel's count of this process's pages on a CPU and from the
caching allocator on a GPU.

A row of the JSONL file: name, variant, shape, dtype, median, p20, p80, unit, peak_mib, device, threads,
versions, git, date. A summary row: {"name": ..., "value": ...} and the last five. Two more: `part`, set by
run_gpu.sh in STPP_PART, where several runs share a file; `cudnn_benchmark` on a GPU, true if cuDNN searched
its algorithms. STPP_GIT names the commit where there is no repository.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stpp import distributed
from stpp.config import Config
from stpp.device import graph_capture
from stpp.distributed import World
from stpp.inference import export
from stpp.loading.sample import Batch, Sample
from stpp.methods.supervised import Supervised
from stpp.training.assemble import fresh_network
from stpp.training.step import Step
from stpp.training.trainer import Schedule, Trainer
from stpp_kernels import flops

MIB = 1024 * 1024
GPU_MEASUREMENT_MS = 20
"""Least duration of a timed run on a GPU, reached by repeating the call."""


class _Parser(argparse.ArgumentParser):
    """Parser whose --small overrides other options."""

    def __init__(self, small: dict[str, Any], **settings):
        super().__init__(**settings)
        self._small = small

    def parse_args(self, args=None, namespace=None):
        options = super().parse_args(args, namespace)
        if options.small:
            vars(options).update(self._small)
        return options


def arguments(description: str, small: dict[str, Any] | None = None) -> argparse.ArgumentParser:
    """Builds a parser with the options common to all benchmarks.

    Args:
        small: options that make the run as short as possible, by name; --small sets these values,
            overriding the command line.
    """
    parser = _Parser(small or {}, description=description)
    parser.add_argument("--out", type=Path, help="JSONL file to write (replaced)")
    parser.add_argument("--append", action="store_true", help="add to the file instead of replacing it")
    parser.add_argument("--small", action="store_true", help="run everything at its smallest size, to check "
                                                             "that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each variant")
    return parser


class Report:
    """Rows of a benchmark's run, printed and written immediately, so that an interrupted run keeps its
    results."""

    def __init__(self, options: argparse.Namespace):
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device, self.rounds, self.out = torch.device(options.device), options.rounds, options.out
        self.rows: list[dict] = []
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            if not options.append:
                self.out.write_text("")
        self._common = {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name(),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "git": os.environ.get("STPP_GIT") or _git_hash(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        if part := os.environ.get("STPP_PART"):
            self._common["part"] = part

    def compare(self, name: str, shape: str, dtype: str, variants: dict[str, Callable[[], object]],
                before: Callable[[str], object] = lambda label: None) -> dict[str, dict]:
        """Measures every variant and returns its row, by name. `before(name)` precedes every turn and is not
        timed."""
        calls = {label: self._calls(variant) for label, variant in variants.items()}
        peaks = {label: self._peak_mib(variant) for label, variant in variants.items()}
        times: dict[str, list[float]] = {label: [] for label in variants}
        for _ in range(self.rounds):
            for label, variant in variants.items():
                before(label)
                times[label].append(call_ms(variant, self.device, calls[label]))
        return {label: self.measured(name, label, shape, dtype, found, peaks[label]) for label,
                found in times.items()}

    def measured(self, name: str, variant: str, shape: str, dtype: str, times_ms: list[float],
                 peak_mib: float | None = None) -> dict:
        """Adds the row of a timed variant, and returns it."""
        row = {"name": name, "variant": variant, "shape": shape, "dtype": dtype,
               "median": statistics.median(times_ms),
               "p20": _quantile(times_ms, 0.2), "p80": _quantile(times_ms, 0.8), "unit": "ms",
               "peak_mib": peak_mib}
        self._add(row)
        return row

    def _calls(self, variant: Callable[[], object]) -> int:
        """Warms up, and returns the calls of one measurement: on a GPU enough to hide the first launch and
        the clock's resolution."""
        call_ms(variant, self.device)
        if self.device.type != "cuda":
            return 1
        return max(1, min(1000, round(GPU_MEASUREMENT_MS / max(call_ms(variant, self.device), 1e-3))))

    def summary(self, name: str, value: float) -> None:
        """Adds one number as a summary of the run."""
        self._add({"name": name, "value": value})

    def finish(self) -> None:
        """Prints the table."""
        print(f"\n{self._common['device']}, {self._common['threads']} threads, torch {torch.__version__}")
        print(f"{'name':<34} {'variant':<18} {'shape':<26} {'dtype':<9} {'median':>10} {'p20':>10} "
              f"{'p80':>10} {'peak':>10}")
        for row in self.rows:
            if "value" in row:
                print(f"{row['name']:<54} {row['value']:.3g}")
            else:
                peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:7.1f} MiB"
                print(
                    f"{row['name']:<34} {row['variant']:<18} {row['shape']:<26} {row['dtype']:<9} "
                    f"{row['median']:7.2f} ms {row['p20']:7.2f} ms {row['p80']:7.2f} ms {peak:>10}"
                )

    def _add(self, row: dict) -> None:
        row = {**row, **self._common}
        if self.device.type == "cuda":
            row["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        self.rows.append(row)
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        shown = f"{row['value']:.4g}" if "value" in row else f"{row['variant']}: {row['median']:.2f} ms"
        print(f"{row['name']} {row.get('shape', '')} {shown}", flush=True)

    def _peak_mib(self, variant: Callable[[], object]) -> float | None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call_ms(variant, self.device)
            return (torch.cuda.max_memory_allocated() - before) / MIB
        return _peak_resident_mib(variant)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keeps freed memory, as `stpp` does on a CPU, while the engine runs next to peers; then restores the
    peers' settings.

        Until a limit is set, glibc raises its limits up to 32 and 64 MiB by itself, so the peers get these.
    """
    distributed.keep_freed_memory()
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            for parameter, value in ((-4, 65536), (-3, 32 * MIB), (-1, 64 * MIB)):
                libc.mallopt(parameter, value)
            libc.malloc_trim(0)


def bare_trainer(config: Config, here: World, folder: Path, num_classes: int, *lists: Sequence[Sample],
                 kind: type[Step] = Supervised) -> Trainer:
    """Builds the Trainer of a run that is never started: only its step is used, and its batches where samples
    are given.

    Args:
        lists: arguments of `kind.streams`, one by default; an empty list is filled with a sample that is
            never read.
    """
    side, classes = config.augment.crop_px, tuple(map(str, range(num_classes)))
    none = Sample(key="none", image="none", mask="none", width=side, height=side)
    step = kind(fresh_network(config, here, classes, stage=1), config)
    filled = [samples or [none] * config.train.batch_global for samples in lists or [()]]
    streams = step.streams(config, *filled)
    return Trainer(config, here, step, streams, key=1, title="bench", classes=classes, folder=folder,
                   schedule=Schedule(steps=1 << 30, validate_steps=1 << 30), validate=None)


def random_batch(count: int, side: int, num_classes: int, device: torch.device, *,
                 ignored: float = 0.0) -> Batch:
    """Draws noise, `count` images of `side` pixels, and labels, of which the share `ignored` is 255."""
    images = torch.randn(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (count, side, side), dtype=torch.uint8, device=device)
    labels[torch.rand(labels.shape, device=device) < ignored] = 255
    return Batch(views=(images,), labels_NHW=labels, indices=None)


def nominal_flop(network: nn.Module, images: torch.Tensor, *, backward: bool) -> int:
    """Counts the operations of a forward pass, optionally with its backward pass, as plain convolutions with
    padding."""
    shell = export.plain_copy(network).to("meta")
    with (
        flops.counter() as counter,
        torch.inference_mode(False),
        torch.set_grad_enabled(backward),
    ):
        logits = shell(torch.empty(images.shape, device="meta"))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


def graphed(variants: dict[str, Callable[[], object]],
            device: torch.device) -> dict[str, Callable[[], object]]:
    """Captures the computations in CUDA graphs, which exclude the host's share; on a CPU renames them.

        A computation that cannot be captured is skipped, and a line gives the reason.
    """
    if device.type != "cuda":
        return {f"{label}, no graph on a CPU": variant for label, variant in variants.items()}
    found = {}
    for label, variant in variants.items():
        try:
            found[f"{label}, CUDA graph"] = _captured(variant, device)
        except RuntimeError as error:
            print(f"{label}: no CUDA graph: {str(error).splitlines()[0]}", flush=True)
    return found


def _captured(variant: Callable[[], object], device: torch.device) -> Callable[[], None]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    # libraries allocate their workspaces and Triton compiles its kernels outside the capture
    with torch.cuda.stream(aside):
        for _ in range(3):
            variant()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with graph_capture(graph, None, device):  # restores PyTorch's state if it fails
        variant()

    def replay(_held=variant) -> None:  # the graph reads the tensors of the variant
        graph.replay()

    return replay


def minimum_ratio(pairs: list[tuple[dict, dict]], key: str = "median") -> float:
    """Returns the smallest ratio of baseline / fused over (fused, baseline) pairs of rows."""
    return min(baseline[key] / fused[key] for fused, baseline in pairs)


def copy_bandwidth(device: torch.device) -> float:
    """Measures the bytes a second, read and written, of a large copy: the limit of memory traffic."""
    source = torch.ones(64 * MIB, device=device)
    target = torch.empty_like(source)
    best_ms = min(call_ms(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / (best_ms / 1000)


def call_ms(variant: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Returns the milliseconds of one call, the mean of `calls` in a row."""
    if device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            variant()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        variant()
    return (time.perf_counter() - begin) * 1000 / calls


def _peak_resident_mib(variant: Callable[[], object]) -> float | None:
    """Returns the peak resident memory during one call above that before it; None without /proc."""
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or earlier calls' freed memory would be reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_kib("VmRSS")
        variant()
        return max(_status_kib("VmHWM") - before, 0) / 1024
    except OSError:
        return None


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _git_hash() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True,
            timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
