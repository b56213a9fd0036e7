"""Assembly of a network for training: initial weights, device placement, and distribution over ranks."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stpp import log
from stpp.config import Config, TrainConfig
from stpp.distributed import World
from stpp.errors import UserError
from stpp.models.build import network_of
from stpp.models.pretrained import start_from
from stpp.training.step import Step

FEW_IMAGES = 8
"""Images per pass below which batch norm within one rank is noisy."""


def fresh_network(config: Config, world: World, classes: Sequence[str], *, stage: int) -> nn.Module:
    """Builds the initial network of a stage, channels_last on the device.

    Args:
        stage: key of the random weights, with the config's seed.

    Raises:
        UserError: the pretrained weights do not fit.
    """
    train, per_pass = config.train, images_per_pass(config.train, world)
    torch.manual_seed(stream_seed(config.seed, stage))
    network = network_of(config.model, len(classes))
    start_from(network, config.model, classes)
    if config.model.freeze_backbone:
        network.freeze_backbone()
    if config.model.freeze_bn:
        network.freeze_batch_norm()
    on_cuda = world.device.type == "cuda"
    if train.sync_bn and on_cuda:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif train.sync_bn:
        log.say("  --train.sync-bn: PyTorch has no synchronised batch norm on a CPU; each rank normalises "
                "over its own images")
    elif world.size > 1 and per_pass < FEW_IMAGES:
        log.say(f"  each rank normalises over {per_pass} images"
                + ("; --train.sync-bn normalises over all" if on_cuda else ""))
    return network.to(world.device, memory_format=torch.channels_last)


def over_ranks(step: Step, world: World, *, accumulate: int) -> nn.Module:
    """Wraps a step so that its gradients are averaged over ranks; returns the step itself for one rank."""
    if world.size == 1:
        return step
    with warnings.catch_warnings():
        # Newer PyTorch renames the flag; older PyTorch lacks the new name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return DistributedDataParallel(
            step, device_ids=[world.device] if world.device.type == "cuda" else None, broadcast_buffers=False,
            gradient_as_bucket_view=True, static_graph=accumulate == 1)


def images_per_pass(train: TrainConfig, world: World) -> int:
    """Computes the images of one stream per backward pass and rank.

    Raises:
        UserError: the global batch is not divisible, or a pass would have a single image.
    """
    parts = world.size * train.accumulate
    if train.batch_global % parts:
        raise UserError(f"--train.batch-global {train.batch_global} does not divide into {world.size} ranks "
                        f"x {train.accumulate} passes; choose a multiple of {parts}")
    if train.batch_global == parts:
        raise UserError(f"--train.batch-global {train.batch_global} leaves one image per rank and pass, and "
                        f"batch norm after global pooling needs two; choose at least {2 * parts}")
    return train.batch_global // parts


def stream_seed(*key: int) -> int:
    """Derives a 63-bit seed for torch's generator from (seed, stage[, step, rank])."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
