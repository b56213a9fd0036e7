"""Stand-ins for CUDA's streams and events without a GPU: they only record the order of waits."""

import contextlib
import threading

import pytest
import torch


class Event:
    """Event that records the work queued on its stream."""

    def __init__(self, name: str, log: list):
        self.name, self._log = name, log

    def synchronize(self) -> None:
        self._log.append(f"host waits for {self.name}")


class Stream:
    """Stream identified by its name."""

    def __init__(self, name: str, log: list, handle: int = 7):
        self.name, self.cuda_stream, self._log, self._events = name, handle, log, 0

    def record_event(self) -> Event:
        self._events += 1
        self._log.append(f"{self.name} event {self._events}")
        return Event(f"{self.name} event {self._events}", self._log)

    def wait_event(self, event: Event) -> None:
        self._log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._log.append(f"host waits for {self.name}")


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces `torch.cuda`'s streams by stand-ins; returns the log of their calls."""
    log: list[str] = []
    main, of_thread = Stream("main", log, 0), threading.local()

    def current(device: torch.device | None = None) -> Stream:
        return getattr(of_thread, "stream", main)

    @contextlib.contextmanager
    def entered(stream: Stream):
        before, of_thread.stream = current(), stream
        try:
            yield
        finally:
            of_thread.stream = before

    def recorded(tensor: torch.Tensor, stream: Stream) -> None:
        log.append(f"{stream.name} uses {tensor.dim()}-d {str(tensor.dtype).removeprefix('torch.')}")

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", recorded)
    return log
