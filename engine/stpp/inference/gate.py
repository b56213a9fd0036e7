"""Accuracy gate: an engine must agree with the float32 eager network on the first images, nearly as well as
eager does in the engine's own precision.

A pixel's class is the argmax of the logits upsampled to the image. In a near-tie of eager, rounding to half
precision may change the class; near-ties have a small margin: the difference of eager's two largest class
probabilities. The raw agreement counts all pixels, the other one those with a margin of at least `MARGIN`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from stpp import log
from stpp.errors import UserError
from stpp.inference.record import Agreement
from stpp_kernels import softmax_accumulate, upsample_argmax

FLOOR = 0.995
"""Minimum share of equal classes outside near-ties."""
ROUNDING = 1.5
"""Maximum ratio of an engine's different pixels to those of eager in the same precision, below the floor."""
LOWEST = 0.97
"""Minimum share whatever the precision loses."""
MARGIN = 0.1
"""Minimum difference of eager's two largest probabilities; pixels below it are near-ties."""
GATE_PX = 1 << 20
"""Number of pixels compared: about six images of 480x360; each view counts as an image."""

Logits = Callable[[torch.Tensor], torch.Tensor]


class Counts:
    """Counts of compared pixels, kept on the device until read."""

    def __init__(self, device: torch.device):
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._pixels = 0

    def add(self, low_NChw: torch.Tensor, eager_NChw: torch.Tensor, size: tuple[int, int]) -> None:
        """Compares N images at full `size` (rows, columns), from low-resolution logits of the engine and of
        eager."""
        for low_Chw, truth in zip(low_NChw, eager_NChw, strict=True):  # one by one: full size is large
            chances_1CHW = truth.new_zeros(1, len(truth), *size, dtype=torch.float32)
            softmax_accumulate(chances_1CHW, truth[None].float().contiguous(), size, size, False)
            first, second = chances_1CHW.topk(2, dim=1).values.unbind(1)
            decided = first - second >= MARGIN
            masks = (upsample_argmax(low[None].float().contiguous(), size) for low in (low_Chw, truth))
            # Non-finite logits match no class, whatever argmax returns for them.
            same = torch.eq(*masks) & low_Chw.isfinite().all()
            self._counts += torch.stack([same.sum(), (same & decided).sum(), decided.sum()])
            self._pixels += same.numel()

    def agreement(self) -> Agreement:
        """Computes the shares. If all pixels are near-ties, they all count as decided."""
        same, same_decided, decided = self._counts.tolist()
        pixels = self._pixels
        raw = same / max(pixels, 1)
        return Agreement(raw=raw, outside=same_decided / decided if decided else raw, margin=MARGIN,
                         decided=decided / max(pixels, 1), pixels=pixels)


def compare(engines: Sequence[Logits], eager: Logits, images: Iterable[torch.Tensor]) -> list[Agreement]:
    """Measures the agreement of each engine on normalised channels_last images [N, 3, H, W], up to `GATE_PX`
    pixels."""
    tallies, left_px = [], GATE_PX
    for images_NCHW in images:
        tallies = tallies or [Counts(images_NCHW.device) for _ in engines]
        truth_NChw, size = eager(images_NCHW), tuple(images_NCHW.shape[2:])
        for tally, engine in zip(tallies, engines, strict=True):
            tally.add(engine(images_NCHW), truth_NChw, size)
        left_px -= images_NCHW[:, 0].numel()
        if left_px <= 0:
            break
    if not tallies:
        raise ValueError("images is empty: there is nothing to compare on")
    return [tally.agreement() for tally in tallies]


def accept(agreement: Agreement, engine: str, rounded: Agreement | None = None) -> None:
    """Logs the agreement of an engine with eager, and rejects the engine if it is too low.

    Args:
        rounded: agreement of eager in the engine's precision, on the same images; None: that is float32.

    Raises:
        UserError: agreement below `FLOOR` outside near-ties, and not for the precision alone; gives both
            figures.
    """
    figures = (f"{_percent(agreement.raw)} of {agreement.pixels} pixels agree with eager, "
               f"{_percent(agreement.outside)} outside near-ties (of the {_percent(agreement.decided)} with "
               f"a margin of {agreement.margin:g} or more)")
    lost = 0.0 if rounded is None else ROUNDING * (1 - rounded.outside)
    if not agreement.outside >= min(FLOOR, max(LOWEST, 1 - lost)):
        raise UserError(f"{engine} is rejected: {figures}; at least {_percent(FLOOR)} outside near-ties is "
                        "required; use --backend eager or another --precision")
    if agreement.outside < FLOOR:
        figures += (f"; PyTorch in the same precision agrees to {_percent(rounded.outside)}: float32 "
                    "(--precision fp32, in training --train.precision fp32) would label these images exactly")
    log.say(f"{engine}: {figures}")


class Gated:
    """Engine that is compared with eager on its first images.

    Args:
        engine: engine whose logits are returned.
        references: makes the float32 network and, if that is another, the one in the engine's precision;
            called once, and released after `GATE_PX` pixels.
        name: description of the engine for log lines.
    """

    def __init__(self, engine, references: Callable[[], list[Logits]], *, name: str):
        self._engine, self._make_references, self._name = engine, references, name
        self._references: list[Logits] = []
        self._tallies: list[Counts] = []
        self._left_px = GATE_PX
        self.num_classes, self.view_px, self.identity = engine.num_classes, engine.view_px, engine.identity
        self.agreement: Agreement | None = None

    def logits(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """See `stpp.inference.protocol.Predictor`.

        Raises:
            UserError: the engine disagrees with eager.
        """
        low_NChw = self._engine.logits(images_NCHW)
        if self._left_px > 0:
            self._judge(images_NCHW, low_NChw)
        return low_NChw

    def _judge(self, images_NCHW: torch.Tensor, low_NChw: torch.Tensor) -> None:
        self._references = self._references or self._make_references()
        self._tallies = self._tallies or [Counts(low_NChw.device) for _ in self._references]
        size = tuple(images_NCHW.shape[2:])
        count = min(len(images_NCHW), -(-self._left_px // (size[0] * size[1])))
        first_NCHW = images_NCHW[:count].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            truth_NChw, *rounded = (network(first_NCHW) for network in self._references)
        for tally, others_NChw in zip(self._tallies, [low_NChw[:count], *rounded], strict=True):
            tally.add(others_NChw, truth_NChw, size)
        first, self._left_px = self.agreement is None, self._left_px - count * size[0] * size[1]
        self.agreement, *rounded = (tally.agreement() for tally in self._tallies)  # sync: first images only
        if first or self._left_px <= 0 or self.agreement.outside < FLOOR:
            accept(self.agreement, self._name, *rounded)
        if self._left_px <= 0:
            self._references, self._tallies = [], []


def _percent(share: float) -> str:
    """Formats a share in percent, rounded down so that less than 99.5 % is never shown as 99.5 %."""
    return f"{int(share * 1e5) / 1e3:.3f} %"
