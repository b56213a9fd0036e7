"""Takes a few training steps of a network without batch statistics and writes its weights.

Arguments: data root, index folder, output file, accumulate, steps, a method (supervised, unimatch,
unimatch-v2), and "rare" for all remedies of rare classes together. Runs alone or under torchrun. Dropout is
off, because it draws other numbers on every rank.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import nn

from stpp import distributed
from stpp.config import AugmentConfig, Config, ConsistencyConfig, RareConfig, TrainConfig
from stpp.dataset import index
from stpp.loading import rare_images
from stpp.loading.sample import Sample
from stpp.methods import unimatch_v2
from stpp.methods.supervised import Supervised
from stpp.methods.unimatch import UniMatch
from stpp.methods.unimatch_v2 import UniMatchV2
from stpp.training import assemble, class_rules
from stpp.training.trainer import Schedule, Trainer


class Plain(nn.Module):
    """Two convolutions at a quarter of the input's size."""

    head_lr_multiplier = 10.0

    def __init__(self, *_):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.classifier = nn.Conv2d(8, 6, 3, padding=1)

    def features(self, images_NCHW):
        return (self.backbone(images_NCHW).relu(),)

    def decode(self, maps_NChw):
        return self.classifier(maps_NChw)

    def forward(self, images_NCHW):
        return self.decode(*self.features(images_NCHW))


def mixed_samples(known: index.Index) -> list[Sample]:
    """Makes every other image strong: padding and cutouts give every rank another number of pixels to
    count."""
    return [known.sample(image, strong=i % 2 == 1) for i, image in enumerate(sorted(known.entries))]


def whole(n: int, channels: list[int], device: torch.device) -> list[torch.Tensor]:
    """Replaces complementary dropout by every channel in both views."""
    return [torch.ones(2 * n, depth, device=device) for depth in channels]


REMEDIES = RareConfig(weights="inverse-sqrt", logit_adjustment=0.5, sampling=0.5)
CONFIDENT = ("disc=0.1", "ring=0.3")


def main(root: str, folder: str, out: str, accumulate: str, steps: str, method: str = "supervised",
         rare: str = "") -> None:
    assemble.network_of = Plain
    torch.nn.functional.dropout2d = lambda maps, p: maps
    unimatch_v2.complementary_dropout = whole
    known = index.load(folder)
    samples = mixed_samples(known)
    kind = {"supervised": Supervised, "unimatch": UniMatch, "unimatch-v2": UniMatchV2}[method]
    lists = [samples]
    if method != "supervised":
        bare = [dataclasses.replace(sample, mask=None) for i, sample in enumerate(samples) if i % 3]
        lists = [samples[::3], bare]
    config = Config(method=method, augment=AugmentConfig(crop_px=64, long_side=(40, 160)),
                    consistency=ConsistencyConfig(confidence=0.2, class_confidence=CONFIDENT if rare else ()),
                    rare=REMEDIES if rare else RareConfig(),
                    train=TrainConfig(batch_global=8, accumulate=int(accumulate), lr=0.05, precision="fp32",
                                      loss="ohem-image" if rare else "ce"))
    with distributed.world("cpu") as here:
        step = kind(assemble.fresh_network(config, here, known.classes, stage=1), config)
        pixels = [sum(column) for column in zip(*known.class_pixels(lists[0]), strict=True)]
        step.rules = class_rules.for_run(config, known.classes, pixels, here.device)
        step.confident.enable(len(known.classes))
        streams = [dataclasses.replace(stream, preference=rare_images.preference(
            stream.samples, len(known.classes), config.rare, here, 1)) if stream.masked else stream
                   for stream in step.streams(config, *lists)]
        ours = Trainer(config, here, step, streams, key=1, title="steps",
                       classes=known.classes, folder=Path(out).parent, validate=None,
                       schedule=Schedule(steps=int(steps), validate_steps=int(steps)))
        losses = []
        for passes, _ in ours._passes():
            losses += distributed.sum_over_ranks(ours.train_step(passes)[0]).tolist()
        confident = step.confident.take()
        if here.is_main:
            torch.save({"weights": step.state_dict(), "losses": losses, "confident": confident}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
