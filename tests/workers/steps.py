"""Takes a few training steps of a network without batch statistics and writes its weights.

Arguments: data root, index folder, output file, accumulate, steps. Run alone or under torchrun.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from stpp import distributed
from stpp.config import AugmentConfig, Config, TrainConfig
from stpp.dataset import index
from stpp.loading.sample import Sample
from stpp.methods.supervised import Supervised
from stpp.training import assemble
from stpp.training.trainer import Schedule, Trainer


class Plain(nn.Module):
    """Two convolutions at a quarter of the input's size."""

    head_lr_multiplier = 10.0

    def __init__(self, *_):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 5, stride=4, padding=2)
        self.classifier = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, images_NCHW):
        return self.classifier(self.backbone(images_NCHW).relu())


def mixed_samples(known: index.Index) -> list[Sample]:
    """Every other image is strong: padding and cutouts leave every rank another number of pixels to count."""
    return [known.sample(image, strong=i % 2 == 1) for i, image in enumerate(sorted(known.entries))]


def main(root: str, folder: str, out: str, accumulate: str, steps: str) -> None:
    assemble.build_model = Plain
    known = index.load(folder)
    samples = mixed_samples(known)
    config = Config(augment=AugmentConfig(crop_px=64, long_side=(40, 160)),
                    train=TrainConfig(batch_global=8, accumulate=int(accumulate), lr=0.05, precision="fp32"))
    with distributed.world("cpu") as here:
        step = Supervised(assemble.fresh_network(config, here, known.classes, stage=1), config)
        ours = Trainer(config, here, step, step.streams(config, samples), key=1, title="steps", classes=known.classes,
                       folder=Path(out).parent, validate=None, schedule=Schedule(steps=int(steps), validate_steps=int(steps)))
        losses = []
        for passes, _ in ours._passes():
            losses.append(distributed.sum_over_ranks(ours.train_step(passes)[0]).item())
        if here.is_main:
            torch.save({"weights": step.network.state_dict(), "losses": losses}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
