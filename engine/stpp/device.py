"""Means to keep a GPU busy: copies that no host waits for, constants that are made once, and cuDNN's search.

A CPU runs the same calls: there a stream is None, memory is not pinned, and tensors are where they belong.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch

CAPTURING = threading.Lock()
"""Held while a CUDA graph is captured, and by threads that load, whose calls of CUDA may break a capture."""


@contextlib.contextmanager
def cudnn_search(enabled: bool) -> Iterator[None]:
    """Switches cuDNN's search inside the block: it times its algorithms for a new shape and takes the
    fastest.

    It pays where few shapes return often, as in training; a search costs up to a second a shape (estimate),
    so native sizes, as in validation and labelling, do better without. Two searches may choose, and so round,
    differently.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 values on a device, for reading only; made once: copying a list there waits for the device."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, dtype=torch.float32, device=device)


def staging(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised host memory, pinned where `device` is a GPU: no copy from or to it need be waited for."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream beside the one that computes; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The side stream of all copies to a device: one, because a stream's memory serves that stream alone."""
    return side_stream(device)


def on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager:
    """Inside the block this thread's work is queued on `stream`; None: where it would be anyway."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


@contextlib.contextmanager
def in_turn(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Queues the block on `stream`, between what the current stream holds and what it gets later.

    So memory may go from one stream to the other, in both directions, without being recorded.
    """
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with on(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None,
             device: torch.device) -> Iterator[None]:
    """Captures the block in `graph` on `stream`, while threads that know of `CAPTURING` wait.

    Calls of other threads, such as DALI's own, concern a capture of mode "thread_local" less than one of the
    default mode, but may still make it fail.

    Raises:
        RuntimeError: it failed. PyTorch goes on as if nothing had been tried.
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
    """Undoes what a failed capture leaves behind, because `CUDAGraph::capture_end` gives up half way.

    The allocator would keep all memory that a second stream has used, and the generator would refuse the
    random numbers of dropout ("Offset increment outside graph capture").
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # it had been ended
        torch._C._cuda_endAllocateToPool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


class Arriving:
    """Tensors that a side stream brings to the device while the host goes on.

    Args:
        tensors: on one device, of the stream's own memory, filled by what it holds so far.
        stream: None on a CPU, where they are there.
    """

    def __init__(self, *tensors: torch.Tensor, stream: torch.cuda.Stream | None):
        self._tensors = tensors
        self._there = None if stream is None else stream.record_event()

    def take(self) -> tuple[torch.Tensor, ...]:
        """The tensors, for the current stream, which waits for them; the host does not."""
        if self._there is not None:
            current = torch.cuda.current_stream(self._tensors[0].device)
            current.wait_event(self._there)
            for tensor in self._tensors:
                tensor.record_stream(current)  # or the side stream might reuse its memory too early
        return self._tensors


class Readback:
    """Results on their way to the host, behind what the current stream holds; only reading them waits."""

    def __init__(self, *results: torch.Tensor):
        device = results[0].device
        self._results, self._there = results, None
        if device.type == "cuda":
            self._results = tuple(staging(*one.shape, dtype=one.dtype, device=device) for one in results)
            for host, one in zip(self._results, results, strict=True):
                host.copy_(one, non_blocking=True)
            self._there = torch.cuda.current_stream(device).record_event()

    def read(self) -> tuple[torch.Tensor, ...]:
        """The results on the CPU."""
        if self._there is None:
            return self._results
        self._there.synchronize()  # sync: the host needs the results now
        return tuple(one.clone() for one in self._results)  # PyTorch never gives pinned memory back
