"""Distributed execution: the process group, and the few collectives that the engine needs.

Without torchrun a run is a world of one rank, in which the collectives do nothing.
"""

import contextlib
import ctypes
import datetime
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from stpp import processes
from stpp.errors import UserError

TIMEOUT_MINUTES = 30.0
"""Timeout of collectives: a rank that waits longer fails, and torchrun ends the job."""

_POLL_S, _LAST_WORD_S = 0.05, 3.0
"""Polling interval of the store; maximum wait of rank 0 until the others have read that it failed."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and device of this process, and the number of ranks."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    """Ranks on this machine."""
    device: torch.device
    store: dist.Store | None = None
    """Key-value store shared by the ranks; empty at each start; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0


@contextlib.contextmanager
def world(device: str = "auto", *, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[World]:
    """Joins torchrun's process group, if there is one, and leaves it at the end of the block.

    Args:
        device: "auto" (CUDA if available), "cuda" or "cpu".
        timeout_minutes: timeout of collectives.

    Raises:
        UserError: CUDA is requested but not available, or this machine has fewer GPUs than ranks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu, or check the driver")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda and local_size > torch.cuda.device_count():
        raise UserError(f"torchrun started {local_size} ranks here but {torch.cuda.device_count()} GPUs are "
                        "visible; lower --nproc-per-node, or use --device cpu")
    own_device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(own_device)
    else:
        torch.set_num_threads(_compute_threads(local_size))
        keep_freed_memory()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store = _fresh_store(rank, size, timeout) if "RANK" in os.environ and size > 1 else None
    if "RANK" in os.environ:
        rendezvous = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timeout,
                                device_id=own_device if use_cuda else None, **rendezvous)
    shared = None if store is None else dist.PrefixStore("stpp", store)
    yield World(rank=rank, size=size, local_size=local_size, device=own_device, store=shared)
    # Not after an exception: NCCL would wait for the other ranks, and torchrun would not see this rank end.
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still uses them
        dist.destroy_process_group()


def _compute_threads(local_size: int) -> int:
    """Returns this rank's share of the cores; a single process uses at most OMP_NUM_THREADS, which torchrun
    sets to 1 by itself for several ranks."""
    threads, limit = max(1, processes.cores() // local_size), os.environ.get("OMP_NUM_THREADS", "")
    return min(threads, int(limit)) if local_size == 1 and limit.isdigit() and int(limit) else threads


def _fresh_store(rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """Creates a store without values of earlier starts: rank 0's own, or a new prefix in torchrun's.

    torchrun may keep its store when it restarts ranks, which would then read addresses of dead processes. So
    rank 0 draws a random prefix and passes it to each rank that announces a fresh random number.
    """
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size,
                          is_master=rank == 0 and not is_agents, timeout=timeout)
    if not is_agents:
        return store
    mine, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    others = range(1, size)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    def met() -> str | None:
        if rank == 0:
            for other in others:
                store.set(f"stpp/welcome/{other}", f"{read(f'stpp/hello/{other}')} {mine}")
            return mine if all(read(f"stpp/thanks/{other}") == mine for other in others) else None
        number, _, name = read(f"stpp/welcome/{rank}").partition(" ")
        if number != mine:
            return None
        store.set(f"stpp/thanks/{rank}", name)
        return name

    store.set(f"stpp/hello/{rank}", mine)
    while (name := met()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {rank} waited {timeout} for the other ranks to start")
        time.sleep(0.05)
    return dist.PrefixStore(f"stpp/{name}", store)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory, also large blocks, for reuse instead of returning it to the system.

    The kernel zeroes fresh pages on first use: a tenth of a training step on small crops, a fifth of
    labelling large images (benchmarks/NOTES.md). With another C library, or if the user has set
    MALLOC_MMAP_MAX_, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or "MALLOC_MMAP_MAX_" in os.environ:
        return
    no_limit = -1
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, no_limit)


def threads_per_rank(world: World, requested: int = 0) -> int:
    """Number of threads: `requested`; if 0, this machine's cores divided by its ranks, at least 1."""
    return requested or max(1, processes.cores() // world.local_size)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds `tensor` over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """Gathers a picklable value of every rank, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Broadcasts the buffers (batch-norm statistics) of rank 0, in one message per dtype."""
    if not dist.is_initialized():
        return
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in model.buffers():
        by_type.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_type.values():
        message = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(message, 0)
        parts = message.split([buffer.numel() for buffer in buffers])
        shaped = [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)]
        torch._foreach_copy_(buffers, shaped)


def call_store(world: World) -> dist.Store | None:
    """Returns a fresh prefix of the ranks' store, shared by this call on all ranks; None in a world of one.

    All ranks must make the same calls in the same order: the n-th calls share a prefix. Does not block.
    """
    if world.store is None:
        return None
    number = world.store.add(f"calls/{world.rank}", 1)
    return dist.PrefixStore(f"call/{number}", world.store)


def on_main(world: World, action: Callable[[], None]) -> None:
    """Runs `action` on rank 0 while the other ranks wait, without a timeout; if it fails, all ranks end, and
    only rank 0 reports the error.

    Raises:
        SystemExit: with code 2, on the other ranks, if rank 0 failed.
    """
    store = call_store(world)
    if world.is_main:
        try:
            action()
        except BaseException:
            if store is not None:
                _report_failure(store, world)
            raise
        if store is not None:
            store.set("end", "done")
    elif store is not None:
        while not store.check(["end"]):
            time.sleep(_POLL_S)
        if store.get("end") == b"failed":
            store.add("read", 1)
            raise SystemExit(2)


def _report_failure(store: dist.Store, world: World) -> None:
    """Reports the failure, and waits a little for the other ranks to read it: the store may end with rank
    0."""
    store.set("end", "failed")
    end = time.monotonic() + _LAST_WORD_S
    while store.add("read", 0) < world.size - 1 and time.monotonic() < end:
        time.sleep(_POLL_S)
