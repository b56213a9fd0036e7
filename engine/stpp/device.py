"""Device helpers: asynchronous copies, cached constants, CUDA graph capture, cuDNN autotuning, compiler.

On a CPU the same calls work: streams are None, memory is not pinned, and nothing is copied.
"""

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Iterator

import torch

CAPTURING = threading.Lock()
"""Lock held during CUDA graph capture, and by loader threads whose CUDA calls may break a capture."""


@contextlib.contextmanager
def cudnn_search(enabled: bool) -> Iterator[None]:
    """Enables or disables cuDNN autotuning (timing all algorithms for each new shape) inside the block.

    Autotuning pays if few shapes recur often, as in training. It costs up to a second per shape (estimate),
    so validation and labelling at native sizes run without. Two searches may choose different algorithms,
    and so round differently.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def has_cpp_compiler() -> bool:
    """Tells whether inductor finds a C++ compiler, which it needs on every device."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++"))


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Returns read-only float32 values on a device; cached, because copying a list waits for the device."""
    with torch.inference_mode(False):  # an inference tensor cannot be used in training later
        return torch.tensor(values, dtype=torch.float32, device=device)


def staging(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocates uninitialised host memory, pinned for a GPU so that copies are asynchronous."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Creates a CUDA stream in addition to the compute stream; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Returns the one stream for all copies to a device: a stream's memory is reused by that stream only."""
    return side_stream(device)


def on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    """Queues this thread's work on `stream` inside the block; None: on the current stream."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


@contextlib.contextmanager
def ordered_on_stream(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Queues the block on `stream`, after all earlier and before all later work of the current stream.

    Memory may thus pass between the two streams, in both directions, without `record_stream`.
    """
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with on_stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextlib.contextmanager
def graph_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None,
                  device: torch.device) -> Iterator[None]:
    """Captures the block as a CUDA graph on `stream`; threads that hold `CAPTURING` delay it.

    Mode "thread_local" makes a capture less sensitive to calls of other threads, for example DALI's, than the
    default mode; they may still make it fail.

    Raises:
        RuntimeError: the capture failed; PyTorch's state is restored.
    """
    pool = torch.cuda.graph_pool_handle()
    try:
        with CAPTURING, torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError:
        if device.type == "cuda":
            _forget_capture(device, pool)
        raise


def _forget_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Cleans up after a failed capture, because `CUDAGraph::capture_end` stops half way.

    Otherwise the allocator would keep all memory that a second stream has used, and the generator would
    reject dropout's random numbers ("Offset increment outside graph capture").
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # already ended
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


class AsyncUpload:
    """Tensors that a side stream copies to the device without blocking the host.

    Args:
        tensors: on one device, allocated on `stream`; its work queued so far fills them.
        stream: None on a CPU, where the tensors are ready.
    """

    def __init__(self, *tensors: torch.Tensor, stream: torch.cuda.Stream | None):
        self._tensors = tensors
        self._copied = None if stream is None else stream.record_event()

    def take(self) -> tuple[torch.Tensor, ...]:
        """Returns the tensors for use on the current stream, which waits for the copy; the host does not."""
        if self._copied is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._copied)
            for tensor in self._tensors:
                tensor.record_stream(current)  # or the side stream might reuse its memory too early
        return self._tensors


class Readback:
    """Asynchronous copy of results to the host, queued on the current stream; only `read` waits."""

    def __init__(self, *results: torch.Tensor):
        device = results[0].device
        self._results, self._copied = results, None
        if device.type == "cuda":
            self._results = tuple(staging(*result.shape, dtype=result.dtype, device=device)
                                  for result in results)
            for host, result in zip(self._results, results, strict=True):
                host.copy_(result, non_blocking=True)
            self._copied = torch.cuda.current_stream(device).record_event()

    def read(self) -> tuple[torch.Tensor, ...]:
        """Returns the results on the CPU."""
        if self._copied is None:
            return self._results
        self._copied.synchronize()  # sync: the host needs the results now
        return tuple(host.clone() for host in self._results)  # PyTorch never gives pinned memory back
