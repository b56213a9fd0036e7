"""Run: lists, folder, and the stages that a method requests.

Stages with a DONE.json are skipped.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import by_class, checkpoint, distributed, files, log
from stpp.config import Config
from stpp.dataset import given_labels, splits
from stpp.dataset import index as indices
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes
from stpp.distributed import World, threads_per_rank
from stpp.errors import UserError
from stpp.inference import predictors
from stpp.inference.evaluate import evaluate, write_scores
from stpp.inference.open import EagerPredictor
from stpp.inference.views import view_size
from stpp.label import labels, reliability
from stpp.loading import loader, rare_images
from stpp.loading.sample import Sample, Stream
from stpp.loading.sampler import stage_samplers
from stpp.methods import METHODS
from stpp.methods.stages import Trained
from stpp.methods.supervised import Supervised, repeat_few
from stpp.metrics import iou_per_class, mean_iou
from stpp.models.build import network_of
from stpp.models.pretrained import start_from
from stpp.models.trained import load_network
from stpp.precision import autocast_dtype
from stpp.report.build import write_report
from stpp.report.examples import PictureRecorder, write_examples
from stpp.report.run import SCORES
from stpp.run import lists, preflight
from stpp.run.calibrated import ensure_calibration, floors_of
from stpp.run.class_monitor import ClassMonitor, pseudo_pixels
from stpp.run.outcome import outcome
from stpp.training import class_rules
from stpp.training.assemble import fresh_network
from stpp.training.class_meter import ClassMeter
from stpp.training.step import Step
from stpp.training.trainer import Schedule, Scores, Trainer

EXAMPLES = 6
"""Maximum validation images in `examples.png`."""
WATCHED = 4
"""Maximum validation images in TensorBoard; the same in every validation."""
PICTURES = 120
"""Images in the report at the end of a run; `stpp report` draws more."""
CONTROL = 7
"""Key of the control's random numbers; the stages have the keys 1 to 6."""


@dataclass
class Run:
    """Lists and folder of a run, and its finished stages."""

    config: Config
    world: World
    index: Index

    def __post_init__(self):
        self.notes = Notes()
        self.lists = lists.read(self.config, self.world, self.index, self.notes)
        self.labelled, self.unlabelled, self.val = self.lists.labelled, self.lists.unlabelled, self.lists.val
        self.labelled_ratio = self.config.train.labelled_ratio
        self.from_teacher = self.config.train.from_teacher
        self.relabel = self.config.label.relabel
        self.class_monitor = ClassMonitor.of(self.index, self.labelled, self.val,
                                             advice=METHODS[self.config.method].advice)
        self.stages: list[dict] = []
        self.controlled: dict | None = None

    def preflight(self) -> None:
        """Checks for problems that would stop the run only after hours of training."""
        model = self.config.model
        self.class_monitor.warn_scarce(self.lists.folder / splits.LABELED, self.notes)
        network = network_of(model, len(self.index.classes))
        preflight.preflight(
            self.config,
            lists={"labeled.txt": self.labelled, "unlabeled.txt": self.unlabelled, "val.txt": self.val},
            weights=checkpoint.size_bytes(network.state_dict()), notes=self.notes,
            twins={self.index.entries[image].key: number for image, number in self.index.twins.items()},
            checks=[lambda: self.lists.check(self.config.method, self.index), self._check_by_class,
                    lambda: preflight.check_crop(self.config.augment.crop_px, network.crop_multiple,
                                                 model.backbone),
                    lambda: start_from(network, model, self.index.classes)])

    def _check_by_class(self) -> None:
        config, classes = self.config, self.index.classes
        class_rules.for_run(config, classes, self.class_monitor.labelled, self.world.device)
        by_class.filled(config.label.class_confidence, "label.class-confidence", classes, 0.0)
        if config.label.min_confidence == "auto" and not self.lists.held_out:
            raise UserError("--label.min-confidence auto calibrates confidences on labels that are not "
                            "trained on, and there is no validation list; give --advise.share 0.1, which "
                            "holds out a part of the labelled images")

    def refuse_warnings(self) -> None:
        """Turns the warnings of the preparation, the lists and the checks into an error (`--strict`)."""
        Notes(warnings=list(dict.fromkeys([*indices.warned(self.index), *self.notes.warnings]))).refuse()

    def provided_masks(self) -> list[Sample]:
        """See `Stages`."""
        config, out = self.config, self.config.out / "given"
        began = any(self._folder("1-retrain").glob("*"))
        distributed.on_main(self.world, lambda: given_labels.check(
            self.unlabelled, config.pseudo_labels, self.index, out, exclude=config.exclude, began=began))
        return given_labels.attach(self.unlabelled, out)

    def train(self, name: str, step: type[Step], *lists: Sequence[Sample], teacher: Path | None = None,
              supervised: bool = False, keep_thirds: bool = False, key: int | None = None) -> Trained:
        """See `Stages`."""
        key = key if key is not None else int(re.match(r"\d+", name)[0])
        train = self.config.train
        streams = step.streams(self.config, *lists)
        per_epoch = stage_samplers(streams, train.batch_global, seed=self.config.seed,
                                   stage=key)[0].steps_per_epoch
        steps = train.stage_steps(per_epoch, supervised=supervised)
        whole = 1 if steps % per_epoch else per_epoch  # thirds end with an epoch if possible
        thirds = tuple(max(1, number * steps // whole // 3) * whole for number in (1, 2, 3))
        validate_epochs = max(train.validate_every, math.ceil(train.validate_min_steps / per_epoch))
        schedule = Schedule(steps=steps, validate_steps=validate_epochs * per_epoch,
                            keep_steps=thirds if keep_thirds else ())
        entries = " + ".join(str(len(stream.samples)) for stream in streams)
        what = f"train on {entries} entries, {steps / per_epoch:g} epochs of {per_epoch} steps"
        self.stages.append(self._once(
            name, what, lambda: self._fit(name, step, lists, schedule, key, teacher=teacher)))
        place = self._folder(name)
        return Trained(best=place / "best.pt",
                       thirds=tuple(place / f"third-{i}.pt" for i in (1, 2, 3)) if keep_thirds else ())

    def control(self) -> None:
        """Trains the control: on labels alone, with the steps and validation interval of the last stage.

        Students that start from their teacher's weights train in sequence, so their control starts from the
        weights of stage 1, and has the steps of all later stages.
        """
        trained = [stage for stage in self.stages if "validate_steps" in stage]
        teacher = self._folder(trained[0]["name"]) / "best.pt" if len(trained) > 1 else None
        equal = trained[1:] if teacher and self.from_teacher else trained[-1:]
        schedule = Schedule(steps=sum(stage["steps"] for stage in equal),
                            validate_steps=trained[-1]["validate_steps"])
        what = ("train on the labels alone for as many steps as "
                f"{' and '.join(stage['name'] for stage in equal)}")
        self.controlled = self._once("control", what, lambda: self._fit(
            "control", Supervised, (repeat_few(self.labelled),), schedule, CONTROL, teacher=teacher))

    def select(self, name: str, checkpoints: Sequence[Path],
               samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """See `Stages`."""
        place = self._folder(name)

        def do() -> dict:
            lines = [splits.line(entry) for entry in self.index.entries_of(samples)]
            mean = reliability.select(self._opening(checkpoints, samples, "none"), samples, lines, self.world,
                                      out=place, title=name, config=self.config.label, data=self.config.data)
            return {"mean_reliability": mean}

        self.stages.append(self._once(name, f"rank {len(samples)} images by the agreement of "
                                            f"{len(checkpoints)} checkpoints", do))
        return tuple(splits.read_split(place / file, self.index, labelled=False)
                     for file in ("reliable_ids.txt", "unreliable_ids.txt"))

    def label(self, name: str, checkpoint: Path, samples: Sequence[Sample]) -> list[Sample]:
        """See `Stages`."""
        config, place = self.config, self._folder(name)

        def do() -> dict:
            floors = self._floors(checkpoint)
            opening = self._opening([checkpoint], samples, config.label.tta)
            labelled = labels.label(opening, samples, self.world, config=config.label, data=config.data,
                                    out=place, title=name, floors=lambda _: floors)
            self.class_monitor.warn_missing(labelled.class_pixels, f"pixels that {name} labelled")
            return {"images": labelled.images, "pseudo_label_miou": labelled.miou}

        what = (f"label {len(samples)} images with the teacher of {checkpoint.parent.name}, "
                f"{config.label.tta} views")
        self.stages.append(self._once(name, what, do))
        return [dataclasses.replace(sample, mask=str(place / labels.mask_name(sample)), strong=True)
                for sample in samples]

    def finish(self, results: dict) -> None:
        """Writes `results.json`, `examples.png` (predictions of the first and the last network) and the
        report."""
        files.write_json(self.config.out / "results.json", results)
        if self.val:
            trained = [stage["name"] for stage in self.stages if stage["steps"]]
            teachers = {name: self._teacher(self._folder(name) / "best.pt")
                        for name in (trained[0], trained[-1])}
            spread = self.val[:: math.ceil(len(self.val) / EXAMPLES)]
            write_examples(self.config.out / "examples.png", spread, teachers, self.world.device)
        out = self.config.out
        try:
            write_report(out, out / "report", most_pictures=PICTURES)
        except Exception as error:  # a failed report must not fail the run
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            log.say(f"no report was written ({reason}); `stpp report {out}` tries again")
        else:
            log.say(f"report: {out / 'report' / 'index.html'}")

    def _fit(self, name: str, step: type[Step], lists: Sequence[Sequence[Sample]], schedule: Schedule,
             key: int, *, teacher: Path | None = None) -> dict:
        network = fresh_network(self.config, self.world, self.index.classes, stage=key)
        if teacher is not None and self.from_teacher:
            network.load_state_dict(load_network(teacher).network.state_dict())
        built = step(network, self.config)
        built.rules = class_rules.for_run(self.config, self.index.classes, self.class_monitor.labelled,
                                          self.world.device)
        streams = self._with_preferences(step.streams(self.config, *lists))
        trainer = Trainer(self.config, self.world, built, streams, key=key, title=name,
                          classes=self.index.classes, folder=self._folder(name), schedule=schedule,
                          validate=self._validated if self.val else None,
                          meter=self._meter(name, built, lists))
        result = trainer.run()
        if self.world.is_main and result.iou:
            write_scores(self._folder(name) / SCORES, images=len(self.val), miou=result.miou, iou=result.iou)
        self.class_monitor.warn_lost(name, result.iou)
        return {"miou": result.miou, "last_miou": result.last_miou, "best_step": result.step,
                "steps": result.steps, "validate_steps": schedule.validate_steps,
                "seconds": round(result.seconds, 1)}

    def _with_preferences(self, streams: Sequence[Stream]) -> list[Stream]:
        """Adds the preference for rare classes to streams with masks, if `--rare.sampling` is set."""
        config, threads = self.config, threads_per_rank(self.world, self.config.data.threads)
        return [dataclasses.replace(stream, preference=rare_images.preference(
            stream.samples, len(self.index.classes), config.rare, self.world, threads))
                if stream.masked else stream for stream in streams]

    def _meter(self, name: str, step: Step, lists: Sequence[Sequence[Sample]]) -> ClassMeter:
        samples = [sample for listed in lists for sample in listed]
        out = self.config.out
        pseudo = pseudo_pixels(samples, out / "stages", out / "given" / given_labels.NAME)
        return ClassMeter(name, step.confident, classes=self.index.classes,
                          labelled=self.class_monitor.labelled, pseudo=pseudo, warn=self.class_monitor.warn)

    def _validated(self, network: torch.nn.Module) -> Scores:
        """Scores a network on the validation list."""
        recorder = PictureRecorder(self.val, self._watched(), len(self.index.classes))
        train = self.config.train
        matrix = evaluate(self._eager(network), self.val, self.world, self.config.data,
                          crop_px=train.validate_window, edges=train.validate_window_edges,
                          on_batch=recorder.record if self.world.is_main else None)
        iou = dict(zip(self.index.classes, (100 * iou_per_class(matrix)).tolist(), strict=True))
        return Scores(miou=mean_iou(matrix), iou=iou, pictures=recorder.pictures)

    def _watched(self) -> list[int]:
        """Chooses a few validation images of this rank, by position."""
        positions = sorted(position for batch in loader.native_share(self.val, self.world)
                           for position in batch)
        return positions[:: math.ceil(len(positions) / WATCHED) or 1]

    def _floors(self, teacher: Path) -> tuple[float, ...]:
        """Confidence thresholds of a teacher's labels by class; empty if all classes have the same."""
        label, classes = self.config.label, self.index.classes
        thresholds = label.min_confidence
        if thresholds == "auto":
            measured = ensure_calibration(self.world, teacher, self._teacher, self.lists.held_out,
                                          self.config.data, tta=label.tta, classes=classes,
                                          precision=label.precision)
            thresholds = floors_of(measured, label.precision)
        elif not label.class_confidence:
            return ()
        return by_class.filled(label.class_confidence, "label.class-confidence", classes, thresholds)

    def _opening(self, paths: list[Path], samples: list[Sample], mode: str) -> predictors.PredictorOpener:
        backend = self.config.label.backend
        if backend == "auto" and self.config.deterministic:
            backend = "eager"  # the choice depends on the number of threads, and so of ranks
        sizes = (view_size(sample.height, sample.width, self.config.data.view_px) for sample in samples)
        pixels = sum(height * width for height, width in sizes) // len(samples)
        return predictors.from_paths(paths, self.world.device, mode=mode, backend=backend,
                                     precision=self.config.train.precision, image_px=pixels,
                                     predictors=METHODS[self.config.method].predictors)

    def _teacher(self, path: Path) -> EagerPredictor:
        return self._eager(load_network(path)[0])

    def _eager(self, network: torch.nn.Module) -> EagerPredictor:
        return EagerPredictor(network, num_classes=len(self.index.classes), device=self.world.device,
                              dtype=autocast_dtype(self.config.train.precision, self.world.device),
                              view_px=self.config.data.view_px)

    def _folder(self, name: str) -> Path:
        return self.config.out / "stages" / name

    def _once(self, name: str, what: str, do: Callable[[], dict]) -> dict:
        """Returns the record of a stage: read if the stage is done, else made by `do` and written."""
        done = self._folder(name) / "DONE.json"
        if done.exists():
            record = json.loads(done.read_text(encoding="utf-8"))
            log.say(f"[{name}] done before: {outcome(record)}")
            return record
        log.say(f"[{name}] {what}")
        started = time.monotonic()
        try:
            record = {"name": name, "miou": None, "steps": 0, "seconds": 0.0} | do()
        except torch.OutOfMemoryError as error:
            what = str(error).splitlines()[0][:120]
            raise UserError(f"[{name}] out of memory on the device ({what}); --train.accumulate "
                            f"{2 * self.config.train.accumulate} halves the images of a training pass, a "
                            "lower --label.batch-pixels those of a labelling batch; start again with another "
                            "--out") from error
        record["seconds"] = record["seconds"] or round(time.monotonic() - started, 1)
        distributed.on_main(self.world, lambda: files.write_json(done, record))
        log.say(f"[{name}] {outcome(record)}")
        return record
