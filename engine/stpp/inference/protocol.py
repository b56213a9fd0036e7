"""What a predictor is, and its two kinds: run by PyTorch, or compiled; and what a backend, which compiles,
must provide."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from stpp import log
from stpp.inference import fold
from stpp.inference.record import EngineRecord, Shapes

Run = Callable[[torch.Tensor], torch.Tensor]
"""Images of the engine's type, channels_last -> float32 logits."""


class Backend(Protocol):
    """A module of `stpp.inference` that compiles networks: an entry of `stpp.inference.build.BACKENDS`, with
    its costs in `stpp.inference.choose.COSTS` and its name in `stpp.config.BackendName`."""

    SHAPES: Shapes
    """Inputs that its engines take where nobody names others."""

    def unavailable(self, device: torch.device) -> str | None:
        """What is missing to compile for `device`, in words that follow the flag; None where nothing is."""

    def versions(self) -> dict[str, str]:
        """Versions, beside PyTorch's, that an engine depends on."""

    def build(self, ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device,
              dtype: torch.dtype, frozen: bool) -> Shapes:
        """Compiles a network into files of `folder`.

        Args:
            ready: from `fold.ready`, on `device` in `dtype`.
            frozen: the weights may become part of the code. False is asked only of backends with such an
                entry in `COSTS`.

        Returns:
            `shapes`, without the sizes too small for the engine.

        Raises:
            UserError: the compiler failed.
        """

    def load(self, folder: Path, *, device: torch.device, swapped: nn.Module | None = None) -> Run:
        """Loads an engine.

        Args:
            swapped: from `fold.ready`: its weights take the place of the engine's own; given only to backends
                that build with `frozen` False, and only if the weights are others.
        """


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What the labels of an opened predictor depend on, besides the device."""

    weights_sha256: str
    """See `stpp.inference.record.weights_sha256`."""
    classes: tuple[str, ...]
    backend: str
    """"eager", "inductor", "tensorrt" or "torch-tensorrt"; with "-frozen" where the weights are part of the
    code."""
    precision: str
    """bf16, fp16 or fp32."""
    output_stride: int | None = None
    """Of the backbone, where there is one: equal weights compute something else at another."""
    view_px: int | None = None
    """See `Predictor`."""

    def __str__(self):
        stride = f"-os{self.output_stride}" if self.output_stride else ""
        view = f"-view{self.view_px}" if self.view_px else ""
        return f"{self.weights_sha256[:16]}{stride}{view}-{self.backend}-{self.precision}"


class Predictor(Protocol):
    """Images in, logits out."""

    num_classes: int
    view_px: int | None
    """Longer side at which the network is to see whole images, pixels; None: their own size. Whoever calls
    `logits` resizes them (`stpp.inference.views.seen`)."""

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Low-resolution float32 logits [N, C, h, w] of normalised float32 channels_last images, any size."""
        ...


class EagerPredictor:
    """A copy of a network as PyTorch runs it."""

    def __init__(self, network: nn.Module, *, num_classes: int, device: torch.device, dtype: torch.dtype,
                 view_px: int | None = None, identity: Identity | None = None):
        self._network, self.identity = fold.ready(network, device=device, dtype=dtype), identity
        self.num_classes, self.view_px, self._dtype = num_classes, view_px, dtype

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See `Predictor`."""
        return self._network(images_NCHW.to(self._dtype))


class CompiledPredictor:
    """An engine; the inputs that it was not built for go to eager, which is made when the first one comes.

    Args:
        run: images of the engine's type, channels_last -> float32 logits.
        record: of the engine.
        identity: of the predictor, whose weights may have been put in place of the engine's own.
        dtype: the engine's type.
        eager: makes the same predictor in the engine's precision.
    """

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor], record: EngineRecord, *,
                 identity: Identity, dtype: torch.dtype, eager: Callable[[], EagerPredictor]):
        self._run, self._dtype, self._make_eager = run, dtype, eager
        self._eager: EagerPredictor | None = None
        self.record, self.identity, self.num_classes = record, identity, len(identity.classes)
        self.view_px = identity.view_px

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See `Predictor`."""
        if not self.record.shapes.hold(images_NCHW):
            return self._fallback(images_NCHW).logits(images_NCHW)
        # Compiled code reads memory as if it were dense; `to` alone would let a crop of larger images
        # through.
        return self._run(images_NCHW.to(self._dtype).contiguous(memory_format=torch.channels_last))

    def _fallback(self, images_NCHW: torch.Tensor) -> EagerPredictor:
        if self._eager is None:
            shapes, (count, _, height, width) = self.record.shapes, images_NCHW.shape
            low, high = ("x".join(map(str, sides)) for sides in (shapes.smallest, shapes.largest))
            log.say(f"{self.record.describe()}: inputs such as {count}x{height}x{width} lie outside {low} to "
                    f"{high} and are computed by eager; --shapes of `stpp compile` sets the range")
            self._eager = self._make_eager()
        return self._eager
