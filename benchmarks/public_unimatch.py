"""Public recipes of UniMatch and UniMatch-V2 as their users run them, in plain PyTorch, for
`bench_unimatch.py`.

Implemented from the methods' description: float32, NCHW, the public code's passes through the network, losses
of full-size logits, PIL and a DataLoader of worker processes. PyTorch's fused attention replaces that of
xformers, which their users have.

Legend: n labelled and n unlabelled images, H W the crop, C classes.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import bench_data
from stpp.images.image_file import IMAGENET_MEAN, IMAGENET_STD
from stpp.inference import export
from stpp.models.dpt import Fusion
from stpp.models.layers import upsample

DECAY, MOMENTUM = 0.996, 0.9


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Arithmetic of a peer: the public recipe's by default."""

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    fused: bool = False
    """Use of a fused optimiser."""
    compiled: bool = False

    def made(self, function: Callable) -> Callable:
        """Returns the function, compiled if `compiled` is set."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class PublishedFusion(Fusion):
    """Fusion with the 1x1 convolution after the upsampling, on four times the cells."""

    def forward(self, x_NCHW: Tensor, fine_NCHW: Tensor | None, size: tuple[int, int]) -> Tensor:
        if fine_NCHW is not None:
            x_NCHW = x_NCHW + self.resConfUnit1(fine_NCHW)
        return self.out_conv(upsample(self.resConfUnit2(x_NCHW), size))


def as_published(network: nn.Module) -> nn.Module:
    """Copies a network into the public code's form, with its own weights."""
    copied = export.plain_copy(copy.deepcopy(network)).train()
    for module in copied.modules():
        if type(module) is Fusion:
            module.__class__ = PublishedFusion
    return copied


class Peer:
    """One step of a method.

    Args:
        network: to be trained; it is copied.
        how: its arithmetic.
        lr, weight_decay: of the backbone.
        head: learning rate of the head over that of the backbone.
        confidence: least confidence of a pixel of the weak view that becomes a label.
    """

    optimizer: Callable[..., torch.optim.Optimizer]

    def __init__(self, network: nn.Module, how: Arithmetic, *, lr: float, weight_decay: float, head: float,
                 confidence: float):
        self.network, self.how, self.confidence = as_published(network), how, confidence
        self.network.to(memory_format=how.layout)
        self.encode, self.decode = self.how.made(self._encode), self.how.made(self.network.decode)
        in_backbone = {id(weight) for weight in self.network.backbone.parameters()}
        groups = [{"params": [], "lr": lr}, {"params": [], "lr": lr * head}]
        for weight in filter(lambda weight: weight.requires_grad, self.network.parameters()):
            groups[id(weight) not in in_backbone]["params"].append(weight)
        self.optimiser = self.optimizer(groups, weight_decay=weight_decay, fused=True if how.fused else None)

    def _encode(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.backbone(images)
        return maps if type(self.network).__name__ == "DPT" else (maps[0], maps[3])

    def full(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Upsamples the logits of feature maps to full size."""
        return F.interpolate(self.decode(*maps), size, mode="bilinear", align_corners=True)

    def __call__(self, x: Sequence[Tensor], u: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """Takes one step.

        Args:
            x: images [n, 3, H, W] and labels [n, H, W].
            u: weak view, two strong ones, padding [n, H, W] (255) and two boxes [n, H, W] (0 or 1).
            other: another augmentation of the same images.

        Returns:
            The loss.
        """
        x, u, other = ([each.contiguous(memory_format=self.how.layout) if each.dim() == 4 else each
                        for each in one] for one in (x, u, other))
        with torch.autocast(x[0].device.type, self.how.dtype, enabled=self.how.dtype != torch.float32):
            loss = self.loss(x, u, other)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.after()
        return loss.detach()

    def loss(self, x: Sequence[Tensor], u: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def after(self) -> None:
        """Updates a moving average, if there is one."""

    def unsure_of(self, logits: Tensor, labels: Tensor, sure: Tensor, ignored: Tensor) -> Tensor:
        """Averages the cross-entropy of confident labels over all pixels that are not padding."""
        loss = F.cross_entropy(logits, labels, reduction="none")
        shown = ignored != 255
        return (loss * ((sure >= self.confidence) & shown)).sum() / shown.sum()


class PublicUniMatch(Peer):
    """UniMatch: the other augmentation is labelled in evaluation mode, then the clean and the dropped
    features of the labelled and the weak images, then the two strong views."""

    @staticmethod
    def optimizer(groups: list[dict], **settings) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=MOMENTUM, **settings)

    def loss(self, x: Sequence[Tensor], u: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        (images, targets), (weak, *strong, ignored, box_1, box_2), n = x, u, len(x[0])
        boxes, size = (box_1 == 1, box_2 == 1), targets.shape[1:]
        with torch.no_grad():
            self.network.eval()
            sure_there, labels_there = self.full(self.encode(other[0]), size).float().softmax(1).max(1)
            self.network.train()
        strong = [torch.where(box[:, None], there, here)
                  for box, there, here in zip(boxes, other[1:3], strong, strict=True)]
        maps = self.encode(torch.cat([images, weak]))
        logits = self.full([torch.cat([each, F.dropout2d(each, 0.5)]) for each in maps], size)
        logits_x, logits_w, _, logits_d = logits.split([n, len(weak)] * 2)
        sure, labels = logits_w.detach().float().softmax(1).max(1)
        mixed = [(torch.where(box, labels_there, labels), torch.where(box, sure_there, sure),
                  torch.where(box, other[3], ignored)) for box in boxes]
        logits_s = self.full(self.encode(torch.cat(strong)), size).chunk(2)
        losses = [self.unsure_of(one, *with_) for one, with_ in zip(logits_s, mixed, strict=True)]
        dropped = self.unsure_of(logits_d, labels, sure, ignored)
        labelled = F.cross_entropy(logits_x, targets, ignore_index=255)
        return (labelled + 0.25 * losses[0] + 0.25 * losses[1] + 0.5 * dropped) / 2


class PublicUniMatchV2(Peer):
    """UniMatch-V2: the moving average labels the weak view; labelled images, then the two strong views."""

    optimizer = torch.optim.AdamW

    def __init__(self, network: nn.Module, how: Arithmetic, **settings):
        super().__init__(network, how, **settings)
        self.steps = 0
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.labelling = how.made(self.average.backbone)

    def loss(self, x: Sequence[Tensor], u: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        (images, targets), (weak, *strong, ignored, box_1, box_2) = x, u
        boxes, size, n = (box_1 == 1, box_2 == 1), targets.shape[1:], len(u[0])
        with torch.no_grad():
            low = self.average.decode(*self.labelling(weak))
            full = F.interpolate(low, size, mode="bilinear", align_corners=True)
            sure, labels = full.float().softmax(1).max(1)
        strong = [torch.where(box[:, None], one.flip(0), one) for box, one in zip(boxes, strong, strict=True)]
        mixed = [[torch.where(box, one.flip(0), one) for one in (labels, sure, ignored)] for box in boxes]
        logits_x = self.full(self.encode(images), size)
        kept = 2.0 * (torch.rand(n, self.network.backbone.channels[0], device=weak.device) < 0.5)
        kept[torch.randperm(n)[: n // 2]] = 1.0
        factor = torch.cat([kept, 2 - kept])[:, :, None, None]
        maps = [each * factor.to(each.dtype) for each in self.encode(torch.cat(strong))]
        logits_s = self.full(maps, size).chunk(2)
        losses = [self.unsure_of(one, *with_) for one, with_ in zip(logits_s, mixed, strict=True)]
        labelled = F.cross_entropy(logits_x, targets, ignore_index=255)
        return (labelled + (losses[0] + losses[1]) / 2) / 2

    @torch.no_grad()
    def after(self) -> None:
        kept = min(1 - 1 / (self.steps + 1), DECAY)
        self.steps += 1
        for mine, theirs in zip(self.average.parameters(), self.network.parameters(), strict=True):
            mine.copy_(mine * kept + theirs.detach() * (1 - kept))


class Unlabelled(bench_data.Public):
    """Unlabelled samples of the public recipe: a weak view, two strong ones, padding, two boxes."""

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        sample = self._samples[i % len(self._samples)]
        image = Image.open(sample.image).convert("RGB")
        image, mask = self._placed(image, Image.new("L", image.size))
        views = [image, *(bench_data._coloured(image) for _ in range(2))]
        ignored = torch.from_numpy(np.array(mask)).long()  # `_placed` pads with 255
        boxes = [torch.from_numpy(self._box()) for _ in range(2)]
        return (*(_normalised(view) for view in views), ignored, *boxes)

    def _box(self) -> np.ndarray:
        """Draws the pasted box as 1, 0 elsewhere: float32 [H, W]."""
        side, found = self._crop, np.zeros((self._crop, self._crop), np.float32)
        if random.random() < 0.5:
            return found
        area = random.uniform(0.02, 0.4) * side**2
        while True:
            ratio = random.uniform(0.3, 1 / 0.3)
            wide, tall = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            x, y = random.randint(0, side - 1), random.randint(0, side - 1)
            if x + wide <= side and y + tall <= side:
                found[y : y + tall, x : x + wide] = 1
                return found


def _normalised(image: Image.Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 255
    pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
