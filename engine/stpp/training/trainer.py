"""Training loop of a stage, shared by all methods, with exact resume from checkpoints.

Legend: T terms of the loss. A pass is one forward and backward call; a step is `accumulate` passes and one
optimiser step.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stpp import checkpoint, distributed, log, signals
from stpp.config import Config
from stpp.device import cudnn_search
from stpp.distributed import World
from stpp.errors import UserError
from stpp.loading import loader
from stpp.loading.sample import Batch, Stream
from stpp.loading.sampler import StepSampler, stage_samplers
from stpp.models.build import architecture_of, parameter_groups
from stpp.precision import autocast_dtype
from stpp.training import batch_norm, compiled
from stpp.training.assemble import over_ranks, stream_seed
from stpp.training.class_meter import ClassMeter
from stpp.training.optimizer import make_optimizer, step_unless
from stpp.training.profiling import BottleneckMeter, Profile
from stpp.training.step import Step
from stpp.training.window import Window

POLY_POWER = 0.9
CALIBRATION = 15
"""Number of the image stream for batch-norm statistics; above those of any step."""
LOG_STEPS = 10
"""Steps between two reads from the device: losses for the log, non-finite steps, and stop requests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a stage, and its validations."""

    steps: int
    """Total optimiser steps."""
    validate_steps: int
    """Steps between validations; the last step is always validated."""
    keep_steps: tuple[int, ...] = ()
    """Steps after which the weights are saved as `third-1.pt`, `third-2.pt`, ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a training stage."""

    miou: float | None
    """Validation mIoU of the chosen weights, in percent; None without a validation list."""
    iou: Mapping[str, float]
    """Validation IoU of the chosen weights, in percent by class; empty if unknown."""
    last_miou: float | None
    """Validation mIoU of the last weights, in percent."""
    step: int
    """Step of the chosen weights."""
    steps: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of a validation."""

    miou: float
    """Mean IoU in percent, the same on every rank."""
    iou: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """IoU in percent, by class."""
    pictures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Pictures of a few predictions, uint8 [H, W, 3] by name; on rank 0."""


class Trainer:
    """Trainer of one stage in `folder`; writes the deployed network to `best.pt`."""

    def __init__(self, config: Config, world: World, step: Step, streams: Sequence[Stream], *, key: int,
                 title: str, classes: Sequence[str], folder: Path, schedule: Schedule,
                 validate: Callable[[nn.Module], Scores] | None, meter: ClassMeter | None = None):
        """
        Args:
            step: step of the method, with its network on the device of `world`.
            streams: input streams of the step.
            key: key of the random numbers, different for each stage.
            validate: function from a network in evaluation mode to its scores; None: no validation list.
            meter: meter of the step's counter; None: no class metrics.
        """
        self.config, self.world, self.step, self.streams = config, world, step, streams
        self.key, self.title = key, title
        self.classes, self.folder, self.schedule, self.validate = classes, folder, schedule, validate
        self.samplers = stage_samplers(streams, config.train.batch_global, seed=config.seed, stage=key)
        self.optimizer = make_optimizer(*parameter_groups(step.network), config.train,
                                        default_multiplier=step.network.head_lr_multiplier)
        self.autocast_dtype = autocast_dtype(config.train.precision, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.autocast_dtype == torch.float16)
        # a step that is not finite ends the run otherwise
        self._may_skip = self.scaler.is_enabled() or config.train.on_nonfinite == "skip"
        if config.train.compile:
            compiled.compile_regions(step)
        self.model = over_ranks(step, world, accumulate=config.train.accumulate)
        self.weights_T = torch.tensor(list(step.weights.values()), dtype=torch.float32, device=world.device)
        self.steps_done, self.best_step, self.best_miou, self.seconds = 0, 0, -1.0, 0.0
        self.best_iou: Mapping[str, float] = {}
        self.last_miou: float | None = None
        self.started = self.saved_at = time.monotonic()
        self.saved_step = 0
        self.bottleneck = BottleneckMeter(title, self.model, world.device)
        self.meter = meter or ClassMeter(title, step.confident)

    def train_step(self, passes: Sequence[tuple[Batch, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one optimiser step on the rank's share of the global batch.

        Args:
            passes: `accumulate` passes, each one batch per stream.

        Returns:
            On the device: float32 [T], this rank's part of each term's mean over the global batch (the sum
            over ranks is the mean); bool scalar, True if the loss or the gradient was not finite. A gradient
            that is not finite changes no weight and no batch-norm statistic.
        """
        # for dropout
        torch.manual_seed(stream_seed(self.config.seed, self.key, self.steps_done, self.world.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self._rate()
        pixels_T = torch.stack([self.step.pixels(*batches) for batches in passes]).sum(0)
        pixels_T = distributed.sum_over_ranks(pixels_T).clamp(min=1)
        statistics = batch_norm.Statistics(self.step.network) if self._may_skip else None

        terms_T = torch.zeros_like(self.weights_T)
        for batches in passes:
            with self._gradient_sync(last=batches is passes[-1]), cudnn_search(not self.config.deterministic):
                with self._autocast():
                    sums_T = self.model(*batches)
                share_T = sums_T / pixels_T
                # DDP averages gradients over ranks; the loss is a sum over ranks.
                self.scaler.scale((self.weights_T * share_T).sum() * self.world.size).backward()
            terms_T += share_T.detach()

        overflowed = self._optimise()
        if statistics is not None:
            statistics.restore(overflowed)
        nonfinite = ~terms_T.isfinite().all()
        if not self.scaler.is_enabled():  # fp16 overflows occasionally, until the scale fits
            nonfinite = nonfinite | overflowed
        self.step.after_step(self.steps_done)
        self.steps_done += 1
        return terms_T, nonfinite

    def _rate(self) -> float:
        """Share of the base learning rate in this step."""
        warm_up = self.config.train.warmup_steps
        rising = min(1.0, (self.steps_done + 1) / (warm_up + 1)) if warm_up else 1.0
        return rising * (1 - self.steps_done / self.schedule.steps) ** POLY_POWER

    def _optimise(self) -> torch.Tensor:
        """Takes an optimiser step unless a gradient is not finite on any rank; returns True (on the device)
        if one is not."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        gradients = [weight.grad for weight in self.step.parameters() if weight.grad is not None]
        overflowed = ~nn.utils.get_total_norm(gradients).isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            step_unless(overflowed, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return overflowed

    def run(self) -> Result:
        """Trains to the last step, resuming from the checkpoint in `folder` if there is one.

        Raises:
            UserError: a file cannot be read or written, or the training diverges.
            SystemExit: after a stop signal, when the checkpoint is saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.started = time.monotonic() - self.seconds
        images = sum(sampler.batch_global for sampler in self.samplers)
        with (log.Metrics(self.folder, first_step=self.steps_done) as self.metrics,
              log.Progress(self.title, self.schedule.steps * images, done=self.steps_done * images) as bar,
              checkpoint.CheckpointWriter() as self.writer, signals.deferred() as stop,
              self._profile() as profile):
            window = Window()
            self.meter.begin(self.metrics, self.steps_done)
            for passes, wait_s in self._passes():
                window.add(*self.train_step(passes), wait_s)
                if profile is not None:
                    profile.step(wait_s)
                stopping, validating = self._stop_requested(stop), self._validating()
                saving = stopping or validating or self._saving()
                if saving or window.steps == LOG_STEPS:
                    self._log(window, bar)
                    minutes = (time.monotonic() - self.saved_at) / 60
                    # clocks of ranks differ, and all must save at the same step
                    saving |= self._on_any_rank(self.world.is_main
                                                and minutes >= self.config.train.checkpoint_minutes)
                    window = Window()
                bar.advance(images)
                self._end_of_epoch()
                self._keep_thirds()
                if validating:
                    self._validate()
                    window = Window()  # validation time does not count
                if saving:
                    self._save()
                if stopping:
                    self._leave(stop)
            if self._on_any_rank(stop.signal is not None):  # in the last validation
                self._leave(stop)
        return Result(miou=self.best_miou if self.validate else None, iou=self.best_iou,
                      last_miou=self.last_miou, step=self.best_step, steps=self.schedule.steps,
                      seconds=time.monotonic() - self.started)

    def _passes(self) -> Iterator[tuple[list[tuple[Batch, ...]], float]]:
        """Yields the passes of each remaining step, and the seconds spent waiting for them."""
        together = zip(*(self._batches(stream, sampler, self.steps_done, self.schedule.steps)
                         for stream, sampler in zip(self.streams, self.samplers, strict=True)), strict=True)
        while True:
            requested_at = time.monotonic()
            passes = list(islice(together, self.config.train.accumulate))
            if not passes:
                return
            yield passes, time.monotonic() - requested_at

    def _batches(self, stream: Stream, sampler: StepSampler, first_step: int,
                 last_step: int) -> Iterator[Batch]:
        """Loads this rank's batches of a stream in the steps first_step <= step < last_step."""
        data = self.config.data
        return loader.pick(data.loader).train_batches(
            stream,
            sampler.micro_batches(first_step, last_step, rank=self.world.rank, world=self.world.size,
                                  accumulate=self.config.train.accumulate),
            augment=self.config.augment, seed=self.config.seed, stage=self.key, device=self.world.device,
            threads=distributed.threads_per_rank(self.world, data.threads))

    def _recalibrated(self, network: nn.Module) -> contextlib.AbstractContextManager:
        """Recomputes batch-norm statistics inside the block, on a fixed set of weakly augmented images, if
        `recalibrate_bn` is set."""
        num_images = self.config.train.recalibrate_bn
        if not num_images:
            return contextlib.nullcontext()
        unique = {sample.key: sample for stream in self.streams for sample in stream.samples}
        stream = Stream(samples=list(unique.values()), views=("weak",), masked=False, number=CALIBRATION)
        (sampler,) = stage_samplers([stream], self.config.train.batch_global, seed=self.config.seed,
                                    stage=self.key)
        steps = max(1, min(num_images, len(unique)) // sampler.batch_global)

        def images() -> Iterator[torch.Tensor]:
            return (batch.images_NCHW for batch in self._batches(stream, sampler, 0, steps))

        return batch_norm.recalibrated(network, images, self.world, autocast=self._autocast())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.autocast_dtype,
                              enabled=self.autocast_dtype != torch.float32)

    @property
    def _precision(self) -> str:
        return str(self.autocast_dtype).removeprefix("torch.")

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager:
        skip = not last and isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if skip else contextlib.nullcontext()

    def _profile(self) -> contextlib.AbstractContextManager[Profile | None]:
        if not self.config.profile:
            return contextlib.nullcontext()
        return Profile(self.folder / "profile", self.world, self.step.network, self.title)

    def _stop_requested(self, stop: signals.Stop) -> bool:
        """Checks for a stop request on any rank; this waits for the device, so on a GPU it is done every
        `LOG_STEPS`."""
        if self.world.device.type == "cuda" and self.steps_done % LOG_STEPS:
            return False
        return self._on_any_rank(stop.signal is not None)

    def _on_any_rank(self, flag: bool) -> bool:
        """Checks for a flag on any rank; every rank must call it."""
        flags = torch.tensor(float(flag), device=self.world.device)
        return distributed.sum_over_ranks(flags).item() > 0  # sync: seldom

    def _leave(self, stop: signals.Stop) -> None:
        """Ends the process after a stop request, once the checkpoint is written."""
        self.writer.wait()
        log.say(f"  {self.title}: stopped at step {self.steps_done}, saved; to resume, run the same command "
                "again")
        stop.leave()

    def _validating(self) -> bool:
        return self.steps_done == self.schedule.steps or self.steps_done % self.schedule.validate_steps == 0

    def _saving(self) -> bool:
        return self.steps_done - self.saved_step >= self.config.train.checkpoint_steps

    def _log(self, window: Window, bar: log.Progress) -> None:
        """Logs the last steps.

        Raises:
            UserError: a step was not finite, and `--train.on-nonfinite` is stop.
        """
        interval = window.close(self.steps_done, self.step.weights)
        self.meter.collect()
        self.bottleneck.add(window.steps, interval.step_s * window.steps, interval.data_wait_pct)
        images = sum(sampler.batch_global for sampler in self.samplers)
        self.metrics.write(self.steps_done, **{"loss": interval.loss} | interval.terms,
                           lr=self.optimizer.param_groups[0]["lr"], images_per_s=images / interval.step_s,
                           data_wait_pct=interval.data_wait_pct)
        bar.advance(0, loss=f"{interval.loss:.3f}", data_wait=f"{interval.data_wait_pct:.0f}%")
        path = self.folder / "nonfinite.jsonl"
        for step in interval.nonfinite:
            log.note(path, {"step": step, "keys": self._keys(step)})
        if interval.nonfinite and self.config.train.on_nonfinite == "stop":
            raise UserError(f"{self.title}: loss or gradient is not finite at step {interval.nonfinite[0]} "
                            f"({path} names its images); lower --train.lr, check the images, or skip "
                            "non-finite steps with --train.on-nonfinite skip")
        if interval.nonfinite:
            log.say(f"  {self.title}: step {interval.nonfinite[0]} was not finite, see {path}")

    def _keys(self, step: int) -> list[str]:
        """Keys of the images of a step, stream after stream."""
        keys = []
        for stream, sampler in zip(self.streams, self.samplers, strict=True):
            (whole,) = sampler.micro_batches(step, step + 1)
            keys += [stream.samples[i].key for i in whole.indices]
        return keys

    def _end_of_epoch(self) -> None:
        whole = self.steps_done % self.samplers[0].steps_per_epoch == 0
        if whole:
            self.bottleneck.end_epoch()
        if whole or self.steps_done == self.schedule.steps:  # an epoch may be longer than the stage
            self.meter.end_epoch(self.metrics, self.steps_done, self.schedule.steps)

    def _keep_thirds(self) -> None:
        for i, step in enumerate(self.schedule.keep_steps, 1):
            if step == self.steps_done:
                with compiled.uncompiled(self.config.train), self._recalibrated(self.step.deployed):
                    self._keep(f"third-{i}.pt")

    def _validate(self) -> None:
        """Validates the current weights, and saves them as `best.pt` if they become the teacher."""
        distributed.broadcast_buffers(self.step)
        with compiled.uncompiled(self.config.train):
            others = {}
            for prefix, network in self.step.compared.items():
                with self._recalibrated(network):
                    others[prefix] = self._scores(network)
            with self._recalibrated(self.step.deployed):
                self._score_and_keep(others)

    def _score_and_keep(self, compared: Mapping[str, Scores | None]) -> None:
        scores = self._scores(self.step.deployed)
        if scores is not None:
            others = {prefix: other.miou for prefix, other in compared.items()}
            self.metrics.write(self.steps_done, miou_pct=scores.miou,
                               **{f"{prefix}_miou_pct": miou for prefix, miou in others.items()})
            self.metrics.show(self.steps_done,
                              values={f"iou_pct/{name}": iou for name, iou in scores.iou.items()},
                              pictures={f"validation/{name}": picture for name,
                                        picture in scores.pictures.items()})
            epoch = self.steps_done / self.samplers[0].steps_per_epoch
            log.say(f"  {self.title}: step {self.steps_done}/{self.schedule.steps}, epoch {epoch:.0f}, mIoU "
                    f"{scores.miou:.2f}"
                    + "".join(f", {prefix} {miou:.2f}" for prefix, miou in others.items()))
        self.last_miou = scores and scores.miou
        at_end = self.steps_done == self.schedule.steps
        if at_end if self.config.train.select == "last" or scores is None else scores.miou > self.best_miou:
            self.best_miou, self.best_iou = (-1.0, {}) if scores is None else (scores.miou, scores.iou)
            self.best_step = self.steps_done
            self._keep("best.pt", miou=self.best_miou, iou=dict(self.best_iou))

    def _scores(self, network: nn.Module) -> Scores | None:
        if self.validate is None:
            return None
        training = network.training
        network.eval()
        try:
            return self.validate(network)
        finally:
            network.train(training)

    def _keep(self, name: str, **scores) -> None:
        """Writes the deployed weights, with classes, architecture, EXIF rule and scores, as `name`."""
        deployed = self.step.deployed
        distributed.broadcast_buffers(deployed)
        if self.world.is_main:
            self.writer.save(self.folder / name, model=deployed.state_dict(), classes=list(self.classes),
                             architecture=architecture_of(self.config.model, self.config.data.view_px),
                             step=self.steps_done, pretrained=getattr(deployed, "pretrained", None),
                             reading={"exif": self.config.data.exif}, **scores)

    def _save(self) -> None:
        """Writes the checkpoint for resuming: everything that the next step depends on."""
        self.seconds = time.monotonic() - self.started
        self.saved_step, self.saved_at = self.steps_done, time.monotonic()
        if self.world.is_main:
            self.writer.save(self.folder / "last.pt", model=self.step.state_dict(),
                             optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                             step=self.steps_done, best_step=self.best_step, best_miou=self.best_miou,
                             best_iou=dict(self.best_iou), last_miou=self.last_miou, seconds=self.seconds,
                             by_class=self.meter.state(),
                             precision=self._precision,
                             pretrained=getattr(self.step.deployed, "pretrained", None))

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.exists():
            return
        saved = checkpoint.load(path)
        weights = saved["model"]
        if not any(name.startswith("network.") for name in weights):  # checkpoints of version 0.1
            weights = {f"network.{name}": value for name, value in weights.items()}
        self.step.load_state_dict(weights)
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty if the steps before had no scaler
            self.scaler.load_state_dict(saved["scaler"])
        if (before := saved.get("precision", self._precision)) != self._precision:
            log.say(f"  {self.title}: resuming in {self._precision}, after steps in {before} on another "
                    "device")
        self.steps_done = self.saved_step = saved["step"]
        self.best_step, self.best_miou, self.seconds = (
            saved["best_step"],
            saved["best_miou"],
            saved["seconds"],
        )
        self.best_iou, self.last_miou = saved.get("best_iou", {}), saved.get("last_miou")
        self.meter.load(saved.get("by_class"))
        best = self.folder / "best.pt"
        if best.exists():  # newer than `last.pt` if the run died between the two writes
            state = checkpoint.load(best)
            self.best_step, self.best_miou, self.best_iou = state["step"], state["miou"], state.get("iou", {})
        log.say(f"  {self.title}: resuming from step {self.steps_done}")
