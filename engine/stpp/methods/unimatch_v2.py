"""UniMatch-V2: a moving average of the network labels the weak view; the network learns from two strong views
with complementary feature channels. FixMatch, with or without the average, is its ablation.

Source: "UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation" (arXiv 2410.10777).
Departures are in docs/unimatch.md.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from stpp.config import Config
from stpp.images.masks import IGNORE
from stpp.loading.sample import Batch, Sample, Stream
from stpp.methods import consistency
from stpp.methods.consistency import mixed_losses, mixed_views, pseudo_labels, shown_pixels, weak_and_strong
from stpp.methods.stages import Stages
from stpp.training.ema import MovingAverage
from stpp.training.loss import labelled_loss
from stpp.training.step import Step


class UniMatchV2(Step):
    """Loss (labelled + (strong 1 + strong 2) / 2) / 2, each a mean over the global batch."""

    weights = {"loss_labelled": 0.5, "loss_strong_1": 0.25, "loss_strong_2": 0.25, "confident_share": 0.0}

    def __init__(self, network: nn.Module, config: Config):
        super().__init__(network, config)
        self.average = MovingAverage(network, config.consistency.ema)

    @classmethod
    def streams(cls, config: Config, labelled: Sequence[Sample],
                unlabelled: Sequence[Sample]) -> tuple[Stream, ...]:
        return weak_and_strong(labelled, unlabelled, strong=2)

    def pixels(self, x: Batch, u: Batch) -> torch.Tensor:
        weak, *strong = shown_pixels(u)
        return torch.stack([(x.labels_NHW != IGNORE).sum(), *strong, weak])

    def forward(self, x: Batch, u: Batch) -> torch.Tensor:
        n, m = len(x.images_NCHW), len(u.images_NCHW)
        with torch.no_grad():
            labels_NHW = pseudo_labels(self.average(u.images_NCHW), u, self.config.consistency.confidence,
                                       self.rules)
        self.confident.add(labels_NHW)
        maps = self.network.features(torch.cat([x.images_NCHW, mixed_views(u)]))
        logits_x, *strong = self.network.decode(*self.dropped(maps, n, m)).split(
            [n] + [m] * (len(u.views) - 1)
        )
        losses = mixed_losses(strong, labels_NHW, u, self.rules)
        confident = (labels_NHW != IGNORE).sum().float()
        labelled = labelled_loss(logits_x, x.labels_NHW, self.config.train, self.rules)
        return torch.stack([labelled, *losses, confident])

    def dropped(self, maps: Sequence[torch.Tensor], n: int, m: int) -> list[torch.Tensor]:
        """Applies complementary dropout to the maps of 2 m strong views; those of n labelled images are
        unchanged."""
        factors = complementary_dropout(m, [each.shape[1] for each in maps], maps[0].device)
        return [torch.cat([each[:n], each[n:] * factor[:, :, None, None].to(each.dtype)]) for each, factor in
                zip(maps, factors, strict=True)]

    def after_step(self, step: int) -> None:
        self.average.update(self.network, step)

    @property
    def deployed(self) -> nn.Module:
        return self.average.network

    @property
    def compared(self) -> Mapping[str, nn.Module]:
        return {"student": self.network}


class FixMatch(UniMatchV2):
    """Loss (labelled + strong) / 2: one strong view, all channels, labels by the moving average."""

    weights = {"loss_labelled": 0.5, "loss_strong": 0.5, "confident_share": 0.0}

    @classmethod
    def streams(cls, config: Config, labelled: Sequence[Sample],
                unlabelled: Sequence[Sample]) -> tuple[Stream, ...]:
        return weak_and_strong(labelled, unlabelled, strong=1)

    def dropped(self, maps: Sequence[torch.Tensor], n: int, m: int) -> list[torch.Tensor]:
        return list(maps)


def complementary_dropout(n: int, channels: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """Draws channel factors for two views of n images: float32 [2 n, D] for each map.

    Each channel of an image is kept, and doubled, in exactly one view; floor(n / 2) random images keep all
    channels in both. Maps of equal depth, as in a ViT, share one draw; others have their own.
    """
    whole_N = torch.zeros(n, dtype=torch.bool, device=device)
    whole_N[torch.randperm(n, device=device)[: n // 2]] = True
    drawn: dict[int, torch.Tensor] = {}
    shared = len(set(channels)) == 1
    factors = []
    for level, depth in enumerate(channels):
        key = 0 if shared else level
        if key not in drawn:
            kept_ND = 2.0 * (torch.rand(n, depth, device=device) < 0.5)
            drawn[key] = torch.cat([kept_ND.masked_fill(whole_N[:, None], 1.0),
                                    (2 - kept_ND).masked_fill(whole_N[:, None], 1.0)])
        factors.append(drawn[key])
    return factors


def train(run: Stages) -> None:
    """Runs the stages of UniMatch-V2."""
    consistency.train(run, "unimatch-v2", UniMatchV2)


def train_fixmatch(run: Stages) -> None:
    """Runs the stages of FixMatch."""
    consistency.train(run, "fixmatch", FixMatch)
