"""Before an engine labels, it must agree with the eager network in float32 on images of the work.

A pixel's class is the argmax of the logits upsampled to the image. Where eager itself is nearly undecided,
rounding may tip it over, in any half precision; such near-ties are told apart by their margin: the difference
of eager's two largest class probabilities. The raw agreement counts all pixels, the other one those with a
margin of at least `MARGIN`.
"""

from collections.abc import Callable, Iterable

import torch

from stpp import log
from stpp.errors import UserError
from stpp.inference.record import Agreement
from stpp_kernels import softmax_accumulate, upsample_argmax

FLOOR = 0.995
"""Least share of equal classes outside near-ties."""
MARGIN = 0.1
"""Difference of the two largest eager probabilities below which a pixel is a near-tie."""
GATE_PX = 1 << 20
"""Pixels of the work that are compared: some six images of 480x360, the views of each counted as images."""

Logits = Callable[[torch.Tensor], torch.Tensor]


class Counts:
    """Counts of pixels compared so far. They stay on the device until asked for."""

    def __init__(self, device: torch.device):
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._pixels = 0

    def add(self, low_NChw: torch.Tensor, eager_NChw: torch.Tensor, size: tuple[int, int]) -> None:
        """Counts the pixels of N images at full `size` (rows, columns); low-resolution logits of the engine
        and of eager."""
        for ours, truth in zip(low_NChw, eager_NChw, strict=True):  # one by one: full-size logits are large
            chances_1CHW = truth.new_zeros(1, len(truth), *size, dtype=torch.float32)
            softmax_accumulate(chances_1CHW, truth[None].float().contiguous(), size, size, False)
            first, second = chances_1CHW.topk(2, dim=1).values.unbind(1)
            decided = first - second >= MARGIN
            masks = (upsample_argmax(low[None].float().contiguous(), size) for low in (ours, truth))
            # Logits that are not numbers equal no class, wherever argmax puts them.
            same = torch.eq(*masks) & ours.isfinite().all()
            self._counts += torch.stack([same.sum(), (same & decided).sum(), decided.sum()])
            self._pixels += same.numel()

    def agreement(self) -> Agreement:
        """The shares. Where eager is decided nowhere, all pixels stand for the decided ones."""
        same, same_decided, decided = self._counts.tolist()
        pixels = self._pixels
        raw = same / max(pixels, 1)
        return Agreement(raw=raw, outside=same_decided / decided if decided else raw, margin=MARGIN,
                         decided=decided / max(pixels, 1), pixels=pixels)


def compare(engine: Logits, eager: Logits, images: Iterable[torch.Tensor]) -> Agreement:
    """Agreement on images [N, 3, H, W], normalised and channels_last, until `GATE_PX` pixels are compared."""
    tally, left_px = None, GATE_PX
    for images_NCHW in images:
        tally = tally or Counts(images_NCHW.device)
        tally.add(engine(images_NCHW), eager(images_NCHW), tuple(images_NCHW.shape[2:]))
        left_px -= images_NCHW[:, 0].numel()
        if left_px <= 0:
            break
    if tally is None:
        raise ValueError("images is empty: there is nothing to compare on")
    return tally.agreement()


def accept(found: Agreement, engine: str) -> None:
    """Says how an engine agrees with eager.

    Raises:
        UserError: less than `FLOOR` outside near-ties; with both figures.
    """
    figures = (f"{_percent(found.raw)} of {found.pixels} pixels as eager, {_percent(found.outside)} outside "
               f"near-ties (of the {_percent(found.decided)} with a margin of {found.margin:g} or more)")
    if not found.outside >= FLOOR:
        raise UserError(f"{engine} is refused: {figures}; at least {_percent(FLOOR)} outside near-ties is "
                        "needed; use --backend eager or another --precision")
    log.say(f"{engine}: {figures}")


class Gated:
    """An engine that is compared with eager on the first images it is given, and then left alone.

    Args:
        engine: the engine; its results are what `logits` returns.
        eager: makes the network in float32; called once, and let go after `GATE_PX` pixels.
        name: of the engine, for people.
    """

    def __init__(self, engine, eager: Callable[[], Logits], *, name: str):
        self._engine, self._make_eager, self._name = engine, eager, name
        self._eager: Logits | None = None
        self._tally: Counts | None = None
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
        self._eager = self._eager or self._make_eager()
        self._tally = self._tally or Counts(low_NChw.device)
        size = tuple(images_NCHW.shape[2:])
        count = min(len(images_NCHW), -(-self._left_px // (size[0] * size[1])))
        first_NCHW = images_NCHW[:count].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            self._tally.add(low_NChw[:count], self._eager(first_NCHW), size)
        first, self._left_px = self.agreement is None, self._left_px - count * size[0] * size[1]
        self.agreement = self._tally.agreement()  # sync: at the first images only
        if first or self._left_px <= 0 or self.agreement.outside < FLOOR:
            accept(self.agreement, self._name)
        if self._left_px <= 0:
            self._eager = self._tally = None


def _percent(share: float) -> str:
    """Rounded down, so that 99.5 % is never said of less."""
    return f"{int(share * 1e5) / 1e3:.3f} %"
