"""Interfaces of predictors and compiler backends, and the eager and compiled predictors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from stpp import log
from stpp.inference import fold, fused
from stpp.inference.record import EngineRecord, Shapes, weights_sha256
from stpp.models.trained import LoadedNetwork

Run = Callable[[torch.Tensor], torch.Tensor]
"""Function from channels_last images of the engine's dtype to float32 logits."""


class Backend(Protocol):
    """Module of `stpp.inference` that compiles networks: an entry of `stpp.inference.build.BACKENDS`, with
    its costs in `stpp.inference.choose.COSTS` and its name in `stpp.config.BackendName`."""

    SHAPES: Shapes
    """Default range of inputs."""

    def unavailable(self, device: torch.device) -> str | None:
        """Reason why the backend cannot compile for `device`, in words that follow the flag; None if it
        can."""

    def versions(self) -> dict[str, str]:
        """Versions of packages, besides PyTorch, that an engine depends on."""

    def build(self, ready: nn.Module, folder: Path, *, shapes: Shapes, device: torch.device,
              dtype: torch.dtype, frozen: bool) -> Shapes:
        """Compiles a network into files of `folder`.

        Args:
            ready: from `fold.ready`, on `device` in `dtype`.
            frozen: the weights may be compiled into the code. False is passed only to backends with such an
                entry in `COSTS`.

        Returns:
            `shapes`, without the sizes too small for the engine.

        Raises:
            UserError: the compiler failed.
        """

    def load(self, folder: Path, *, device: torch.device, swapped: nn.Module | None = None) -> Run:
        """Loads an engine.

        Args:
            swapped: from `fold.ready`; its weights replace the engine's own. Passed only to backends that
                build with `frozen` False, and only if the weights differ.
        """


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that a predictor's labels depend on, except the device."""

    weights_sha256: str
    """See `stpp.inference.record.weights_sha256`."""
    classes: tuple[str, ...]
    backend: str
    """"eager", "eager-fused", "inductor", "tensorrt" or "torch-tensorrt"; with "-frozen" if the weights are
    compiled in."""
    precision: str
    """bf16, fp16 or fp32."""
    output_stride: int | None = None
    """Output stride of the backbone, if it has one: with the same weights, it changes the result."""
    view_px: int | None = None
    """See `Predictor`."""

    def __str__(self):
        return f"{self.network}-{self.backend}-{self.precision}"

    @property
    def network(self) -> str:
        """Weights, output stride and view size: other predictors of them differ by rounding only."""
        stride = f"-os{self.output_stride}" if self.output_stride else ""
        view = f"-view{self.view_px}" if self.view_px else ""
        return f"{self.weights_sha256[:16]}{stride}{view}"


def identity_of(loaded: LoadedNetwork) -> Identity:
    """Makes the identity of a network in eager PyTorch, without a precision."""
    return Identity(weights_sha256=weights_sha256(loaded.network.state_dict()), classes=tuple(loaded.classes),
                    backend="eager", precision="", output_stride=loaded.architecture.get("output_stride"),
                    view_px=loaded.architecture.get("view_px"))


class Predictor(Protocol):
    """Network that computes logits of images."""

    num_classes: int
    view_px: int | None
    """Longer side, in pixels, to which the caller of `logits` resizes whole images
    (`stpp.inference.views.resize_to_view`); None: original size."""

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Computes low-resolution float32 logits [N, C, h, w] of normalised float32 channels_last images."""
        ...


class EagerPredictor:
    """Predictor that runs a copy of the network in PyTorch, on request with fused convolutions."""

    def __init__(self, network: nn.Module, *, num_classes: int, device: torch.device, dtype: torch.dtype,
                 view_px: int | None = None, identity: Identity | None = None, fuse: bool = False):
        self._network, self.identity = fold.ready(network, device=device, dtype=dtype), identity
        if fuse:
            fused.fuse(self._network)
        self.num_classes, self.view_px, self._dtype = num_classes, view_px, dtype

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See `Predictor`."""
        return self._network(images_NCHW.to(self._dtype))


class CompiledPredictor:
    """Predictor that runs an engine, and eager for inputs outside the engine's range.

    Args:
        run: function from channels_last images of the engine's dtype to float32 logits.
        record: record of the engine.
        identity: identity of the predictor, whose weights may have replaced the engine's own.
        dtype: dtype of the engine.
        eager: makes the eager predictor in the engine's precision; called on the first such input.
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
        # Compiled code assumes dense memory; `to` alone would let a crop of larger images through.
        return self._run(images_NCHW.to(self._dtype).contiguous(memory_format=torch.channels_last))

    def _fallback(self, images_NCHW: torch.Tensor) -> EagerPredictor:
        if self._eager is None:
            shapes, (count, _, height, width) = self.record.shapes, images_NCHW.shape
            low, high = ("x".join(map(str, sides)) for sides in (shapes.smallest, shapes.largest))
            log.say(f"{self.record.describe()}: inputs outside {low} to {high}, for example "
                    f"{count}x{height}x{width}, run in eager; --shapes of `stpp compile` sets the range")
            self._eager = self._make_eager()
        return self._eager
