"""One training run: a model, a list of samples, and the loop between them.

Shapes: N images of a backward pass, C classes, H W crop size, h w size of the low-resolution logits.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stpp import checkpoint, distributed, log, signals
from stpp.config import Config, ModelConfig, TrainConfig
from stpp.device import cudnn_search
from stpp.distributed import World
from stpp.errors import UserError
from stpp.loading import loader
from stpp.loading.sample import Batch, Sample
from stpp.loading.sampler import StepSampler
from stpp.models import imagenet
from stpp.models.build import build_model, parameter_groups
from stpp.models.weights import load_backbone, load_model, read_checkpoint, state_dict_of
from stpp.precision import autocast_dtype
from stpp.training.optimizer import make_optimizer, step_unless
from stpp.training.profiling import Bottleneck, Profile
from stpp_kernels import upsample_cross_entropy

IGNORE = 255
POLY_POWER = 0.9
LOOK_STEPS = 10
"""Steps between two looks at the device: for the log, for what was not finite, and for whether to stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run trains and when it looks up."""

    steps: int
    """Optimiser steps in all."""
    validate_steps: int
    """Steps between two validations; the last step is always validated."""
    keep_steps: tuple[int, ...] = ()
    """Steps after which the weights are kept as `third-1.pt`, `third-2.pt`, ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a training run ended with."""

    miou: float | None
    """Validation mIoU of the chosen weights, percent; None without a validation list."""
    step: int
    """Step of the chosen weights."""
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What a validation found."""

    miou: float
    """Percent, the same on every rank."""
    iou: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Percent, by class."""
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the network makes of a few images, uint8 [H, W, 3] by their names; on rank 0."""


class Trainer:
    """Trains one stage in `folder` and leaves its teacher there as `best.pt`."""

    def __init__(self, config: Config, here: World, samples: Sequence[Sample], *, stage: int, title: str,
                 classes: Sequence[str], folder: Path, schedule: Schedule,
                 validate: Callable[[nn.Module], Scores] | None):
        """
        Args:
            samples: the list of one epoch; every sample has a mask.
            stage: number that keys the random numbers, so that no two stages share them.
            validate: network in evaluation mode -> its scores; None: no validation list.
        """
        self.config, self.here, self.samples, self.stage, self.title = config, here, samples, stage, title
        self.classes, self.folder, self.schedule, self.validate = classes, folder, schedule, validate
        train = config.train
        self.sampler = StepSampler(len(samples), train.batch_global, seed=config.seed, stage=stage)
        per_pass = images_per_pass(train, here)
        torch.manual_seed(stream_seed(config.seed, stage))
        self.network = build_model(config.model.name, config.model.backbone, len(classes), config.model.output_stride)
        start_from(self.network, config.model, classes)
        if train.sync_bn:
            if here.device.type == "cpu":
                raise UserError("--train.sync-bn needs CUDA: PyTorch has no synchronised batch norm on a CPU")
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        elif here.size > 1 and per_pass < 8:
            log.say(f"  each rank normalises over {per_pass} images"
                    + ("; --train.sync-bn normalises over all" if here.device.type == "cuda" else ""))
        self.network.to(here.device, memory_format=torch.channels_last)
        backbone, head = parameter_groups(self.network)
        self.optimizer = make_optimizer(backbone, head, train, default_multiplier=self.network.head_lr_multiplier)
        self.autocast_dtype = autocast_dtype(train.precision, here.device)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=self.autocast_dtype == torch.float16)
        self.model = self.network if here.size == 1 else self._distributed()
        self.step, self.best_step, self.best_miou, self.seconds = 0, 0, -1.0, 0.0
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.bottleneck = Bottleneck(title, self.model)

    def _distributed(self) -> nn.Module:
        with warnings.catch_warnings():
            # Newer PyTorch renames the flag; older PyTorch does not know the new name.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return DistributedDataParallel(
                self.network, device_ids=[self.here.device] if self.here.device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=self.config.train.accumulate == 1)

    def train_step(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimiser step on the rank's share of the global batch.

        Args:
            micro_batches: `accumulate` batches, one for each backward pass.

        Returns:
            On the device: float32 scalar, this rank's part of the mean loss over the counted pixels of the global batch (the
            parts of all ranks add up to it); bool scalar, whether loss or gradient were not finite. Such a gradient
            changes no weight.
        """
        torch.manual_seed(stream_seed(self.config.seed, self.stage, self.step, self.here.rank))  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - self.step / self.schedule.steps) ** POLY_POWER
        counted = torch.stack([(batch.labels_NHW != IGNORE).sum() for batch in micro_batches]).sum()
        distributed.sum_over_ranks(counted)

        loss = torch.zeros((), device=self.here.device)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with self._gradient_sync(last), cudnn_search(not self.config.deterministic):  # crops are of one size
                with torch.autocast(self.here.device.type, self.autocast_dtype,
                                    enabled=self.autocast_dtype != torch.float32):
                    logits_NChw = self.model(batch.images_NCHW)
                loss_sum, _ = upsample_cross_entropy(logits_NChw, batch.labels_NHW, ignore_index=IGNORE)
                share = loss_sum / counted.clamp(min=1)
                # DDP averages gradients over ranks; the loss is a sum over ranks.
                self.scaler.scale(share * self.here.size).backward()
            loss += share.detach()

        nonfinite = ~loss.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # looks itself: fp16 overflows now and then, until the scale fits
            self.scaler.update()
        else:
            gradients = [weight.grad for weight in self.network.parameters() if weight.grad is not None]
            overflowed = ~nn.utils.get_total_norm(gradients).isfinite()
            step_unless(overflowed, self.optimizer)
            nonfinite |= overflowed
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, nonfinite

    def run(self) -> Result:
        """Trains from wherever `folder` left off to the last step.

        Raises:
            UserError: a file cannot be read or written, or the training diverges.
            SystemExit: told to stop by a signal, after saving.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        started, total = time.monotonic() - self.seconds, self.schedule.steps
        window = _Window()
        with (log.Metrics(self.folder, first_step=self.step) as metrics,
              log.Progress(self.title, total * self.sampler.batch_global, done=self.step * self.sampler.batch_global) as bar,
              checkpoint.Writer() as self.writer, signals.deferred() as stop, self._profile() as profile):
            for micro_batches, wait_s in self._batches():
                window.add(*self.train_step(micro_batches), wait_s)
                if profile is not None:
                    profile.step(wait_s)
                to_validate = self.step == total or self.step % self.schedule.validate_steps == 0
                told_to_stop = self._told_to_stop(stop)
                to_save = to_validate or told_to_stop or self.step - self.saved_step >= self.config.train.checkpoint_steps
                if to_save or window.steps == LOOK_STEPS:
                    self._look(window, metrics, bar)
                    window = _Window()
                    to_save |= time.monotonic() - self.saved_at >= 60 * self.config.train.checkpoint_minutes
                bar.advance(self.sampler.batch_global)
                if self.step % self.sampler.steps_per_epoch == 0:
                    self.bottleneck.epoch()
                for i, step in enumerate(self.schedule.keep_steps, 1):
                    if step == self.step:
                        self._keep(f"third-{i}.pt")
                if to_validate:
                    self._validate(metrics)
                    window = _Window()  # its time does not count
                if to_save:
                    self.seconds = time.monotonic() - started
                    self._save()
                if told_to_stop:
                    self.writer.wait()
                    log.say(f"  {self.title}: stopped at step {self.step}, saved; the same command goes on")
                    stop.leave()
        return Result(miou=self.best_miou if self.validate else None, step=self.best_step, steps=total,
                      seconds=time.monotonic() - started)

    def _batches(self) -> Iterator[tuple[list[Batch], float]]:
        """The micro batches of each remaining step, and the seconds spent waiting for them."""
        train, data = self.config.train, self.config.data
        draws = self.sampler.micro_batches(self.step, self.schedule.steps, rank=self.here.rank, world=self.here.size,
                                           accumulate=train.accumulate)
        batches = loader.pick(data.loader).train_batches(
            self.samples, draws, augment=self.config.augment, seed=self.config.seed, stage=self.stage,
            device=self.here.device, threads=distributed.threads_per_rank(self.here, data.threads), exif=data.exif)
        while True:
            asked = time.monotonic()
            micro_batches = list(islice(batches, train.accumulate))
            if not micro_batches:
                return
            yield micro_batches, time.monotonic() - asked

    def _profile(self) -> contextlib.AbstractContextManager[Profile | None]:
        if not self.config.profile:
            return contextlib.nullcontext()
        return Profile(self.folder / "profile", self.here, self.model, self.title)

    def _told_to_stop(self, stop: signals.Stop) -> bool:
        """Whether a rank was told to stop; asking waits for the device, so on a GPU it is done once in a while."""
        if self.here.device.type == "cuda" and self.step % LOOK_STEPS:
            return False
        return distributed.sum_over_ranks(torch.tensor(float(stop.signal is not None), device=self.here.device)).item() > 0

    def _look(self, window: "_Window", metrics: log.Metrics, bar: log.Progress) -> None:
        """Writes down what the last steps were like.

        Raises:
            UserError: one was not finite, and `--train.on-nonfinite` is stop.
        """
        look = window.close(self.step)
        self.bottleneck.add(look.step_s * window.steps, look.data_wait_pct)
        lr = self.optimizer.param_groups[0]["lr"]
        metrics.write(self.step, loss=look.loss, lr=lr, images_per_s=self.sampler.batch_global / look.step_s,
                      data_wait_pct=look.data_wait_pct)
        bar.advance(0, loss=f"{look.loss:.3f}", data_wait=f"{look.data_wait_pct:.0f}%")
        path = self.folder / "nonfinite.jsonl"
        for step in look.nonfinite:
            (whole,) = self.sampler.micro_batches(step, step + 1)
            log.note(path, {"step": step, "keys": [self.samples[i].key for i in whole.indices]})
        if look.nonfinite and self.config.train.on_nonfinite == "stop":
            raise UserError(f"{self.title}: loss or gradient is not finite at step {look.nonfinite[0]} ({path} names its images); "
                            f"lower --train.lr, look at the images, or pass over such steps with --train.on-nonfinite skip")
        if look.nonfinite:
            log.say(f"  {self.title}: step {look.nonfinite[0]} was not finite and is passed over, see {path}")

    def _gradient_sync(self, last: bool):
        skip = not last and isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if skip else torch.enable_grad()

    def _validate(self, metrics: log.Metrics) -> None:
        """Scores the current weights and keeps them as `best.pt` if they are to be the teacher."""
        distributed.broadcast_buffers(self.network)
        miou = None
        if self.validate is not None:
            self.network.eval()
            scores = self.validate(self.network)
            self.network.train()
            miou = scores.miou
            metrics.write(self.step, miou_pct=miou)
            metrics.show(self.step, values={f"iou_pct/{name}": iou for name, iou in scores.iou.items()},
                         pictures={f"validation/{name}": picture for name, picture in scores.pictures.items()})
            epoch = self.step / self.sampler.steps_per_epoch
            log.say(f"  {self.title}: step {self.step}/{self.schedule.steps}, epoch {epoch:.0f}, mIoU {miou:.2f}")
        at_end = self.step == self.schedule.steps
        if at_end if self.config.train.select == "last" or miou is None else miou > self.best_miou:
            self.best_miou, self.best_step = miou if miou is not None else -1.0, self.step
            self._keep("best.pt", miou=self.best_miou)

    def _keep(self, name: str, **scores: float) -> None:
        """Writes the weights, with what is needed to use them and their scores, as `name`."""
        distributed.broadcast_buffers(self.network)
        if self.here.is_main:
            self.writer.save(self.folder / name, model=self.network.state_dict(), classes=list(self.classes),
                            architecture=dataclasses.asdict(self.config.model), step=self.step, **scores)

    def _save(self) -> None:
        """Writes everything that the next step depends on."""
        self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.here.is_main:
            self.writer.save(self.folder / "last.pt", model=self.network.state_dict(),
                             optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), step=self.step,
                             best_step=self.best_step, best_miou=self.best_miou, seconds=self.seconds)

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.exists():
            return
        saved = checkpoint.load(path)
        self.network.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        for name in ("step", "best_step", "best_miou", "seconds"):
            setattr(self, name, saved[name])
        self.saved_step = self.step
        best = self.folder / "best.pt"
        if best.exists():  # written later than `last.pt`, if the run died between the two
            kept = checkpoint.load(best)
            self.best_step, self.best_miou = kept["step"], kept["miou"]
        log.say(f"  {self.title}: going on from step {self.step}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Look:
    """What the last few steps were like, over all ranks."""

    loss: float
    """Mean over the steps that were finite."""
    data_wait_pct: float
    """Share of the time spent waiting for data."""
    step_s: float
    nonfinite: list[int]
    """Steps, counted from 0, whose loss or gradient was not finite."""


class _Window:
    """Loss and time of the last few steps, read from the device once for all of them."""

    def __init__(self):
        self._wait_s, self._since = 0.0, time.monotonic()
        self._losses: list[torch.Tensor] = []
        self._nonfinite: list[torch.Tensor] = []

    @property
    def steps(self) -> int:
        return len(self._losses)

    def add(self, loss: torch.Tensor, nonfinite: torch.Tensor, wait_s: float) -> None:
        self._losses.append(loss)
        self._nonfinite.append(nonfinite)
        self._wait_s += wait_s

    def close(self, step: int) -> _Look:
        """What the window's steps, of which `step` would be the next, were like."""
        both = torch.stack([torch.stack(self._losses), torch.stack(self._nonfinite).float()])
        losses, flags = distributed.sum_over_ranks(both).tolist()  # the one wait for the device
        finite = [loss for loss, flag in zip(losses, flags, strict=True) if not flag]
        spent = time.monotonic() - self._since
        return _Look(loss=sum(finite) / len(finite) if finite else math.nan, data_wait_pct=100 * self._wait_s / spent,
                     step_s=spent / self.steps, nonfinite=[step - self.steps + i for i, flag in enumerate(flags) if flag])


def start_from(network: nn.Module, model: ModelConfig, classes: Sequence[str]) -> None:
    """Loads `--model.pretrained` into a new network: a whole network if the file holds one, else its backbone.

    Raises:
        UserError: the file is unfit or cannot be downloaded, or a run of this project wrote it for other classes.
    """
    if model.pretrained == "none":
        return
    path = imagenet.weights_file(model.backbone) if model.pretrained == "imagenet" else model.pretrained
    content = read_checkpoint(path)
    theirs = content.get("classes")
    if isinstance(theirs, list) and theirs != list(classes):
        raise UserError(f"--model.pretrained {path} has {len(theirs)} classes ({', '.join(map(str, theirs))}), this "
                        f"data set {len(classes)} ({', '.join(classes)}); give a checkpoint of the same classes, or a ResNet")
    whole = any(key.startswith("backbone.") for key in state_dict_of(content))
    report = load_model(network, path, strict=False) if whole else load_backbone(network, path)
    log.say(f"  {report.summary()}")


def images_per_pass(train: TrainConfig, here: World) -> int:
    """Images of one backward pass of one rank.

    Raises:
        UserError: the global batch does not divide, or one image would be normalised alone.
    """
    parts = here.size * train.accumulate
    if train.batch_global % parts:
        raise UserError(f"--train.batch-global {train.batch_global} does not divide into {here.size} ranks x "
                        f"{train.accumulate} passes; choose a multiple of {parts}")
    if train.batch_global == parts:
        raise UserError(f"--train.batch-global {train.batch_global} leaves one image per rank and pass, and batch norm "
                        f"after global pooling needs two; choose at least {2 * parts}")
    return train.batch_global // parts


def stream_seed(*key: int) -> int:
    """A 63-bit seed for torch's generator from (seed, stage[, step, rank]): equal keys, equal numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
