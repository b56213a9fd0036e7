"""A run: its lists, its folder, and the stages that a method asks of it.

A stage that has its DONE.json is not done again.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stpp import checkpoint, distributed, files, log
from stpp.config import Config
from stpp.dataset import given_labels, splits
from stpp.dataset import index as indices
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.distributed import World
from stpp.errors import UserError
from stpp.inference import several
from stpp.inference.evaluate import evaluate, write_scores
from stpp.inference.open import EagerTeacher
from stpp.label import labels, reliability
from stpp.loading import loader
from stpp.loading.sample import Sample
from stpp.loading.sampler import stage_samplers
from stpp.methods import METHODS
from stpp.methods.stages import Trained
from stpp.methods.supervised import Supervised, few_twice
from stpp.metrics import iou_per_class, mean_iou
from stpp.models.build import network_of
from stpp.models.pretrained import start_from
from stpp.models.trained import load_network
from stpp.precision import autocast_dtype
from stpp.report.build import write_report
from stpp.report.examples import Watch, write_examples
from stpp.report.run import SCORES
from stpp.run import folder, lease, preflight
from stpp.training.assemble import fresh_network, images_per_pass
from stpp.training.step import Step
from stpp.training.trainer import Schedule, Scores, Trainer
from stpp_kernels import described

EXAMPLES = 6
"""Validation images in `examples.png`, at most."""
WATCHED = 4
"""Validation images that TensorBoard shows, at most; they are the same in every validation."""
PICTURES = 120
"""Images that the report at the end of a run draws; `stpp report` draws more."""
CONTROL = 7
"""Key of the control's random numbers; the stages use their own numbers, 1 to 6."""


def selftrain(config: Config, here: World) -> dict:
    """Runs every stage of `config.method` that is not done yet.

    Returns:
        What `results.json` holds: `{"method", "stages": [{"name", "miou", "steps", "seconds"}, ...], "control"}`,
        mIoU in percent.

    Raises:
        UserError: the data, the recipe or the run directory do not allow the run.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    per_pass = images_per_pass(config.train, here)
    if METHODS[config.method].pairs and per_pass % 2:
        raise UserError(f"--train.batch-global {config.train.batch_global} gives {per_pass} images a rank and pass, and --method "
                        f"{config.method} mixes pairs; choose a multiple of {2 * here.size * config.train.accumulate}")
    with contextlib.ExitStack() as stack:
        distributed.on_main(here, lambda: stack.enter_context(lease.held(config.out)))
        return _run(config, here)


def _run(config: Config, here: World) -> dict:
    distributed.on_main(here, lambda: folder.claim(config))
    index = _prepared_index(config, here)
    distributed.on_main(here, lambda: folder.record_provenance(
        config.out, index.fingerprint, index.classes))
    run = Run(config, here, index)
    log.say(f"{config.method} in {config.out}: {here.size} x {here.device.type}, "
            f"{str(autocast_dtype(config.train.precision, here.device)).removeprefix('torch.')}, "
            f"{len(run.labelled)} labelled, {len(run.unlabelled)} unlabelled, {len(run.val)} validation images")
    log.say(f"operators: {described(here.device.type)}")
    distributed.on_main(here, run.preflight)
    if config.strict:
        distributed.on_main(here, run.refuse_warnings)
    METHODS[config.method].run(run)
    if config.control or (config.out / "stages" / "control" / "DONE.json").exists():
        run.control()
    results = {"method": config.method, "stages": run.stages} | ({"control": run.controlled} if run.controlled else {})
    distributed.on_main(here, lambda: run.finish(results))
    log.say(summary(results))
    return results


@dataclass
class Run:
    """The lists of a run, its folder, and the stages done so far."""

    config: Config
    here: World
    index: Index

    def __post_init__(self):
        config = self.config
        self.notes = notes = Notes()
        folder = config.data.split or config.out / "split"
        if config.data.split is None:
            distributed.on_main(self.here, lambda: splits.make_split(
                self.index, folder, fraction=config.data.fraction, seed=config.data.split_seed,
                val=config.data.val, notes=notes))
        self.labelled = splits.read_split(folder / "labeled.txt", self.index, labelled=True, notes=notes)
        self.unlabelled: list[Sample] = []
        if METHODS[config.method].unlabelled:
            self.unlabelled = splits.read_split(folder / "unlabeled.txt", self.index, labelled=False, notes=notes)
            self._name_unused(folder)
        self.val: list[Sample] = []
        listed = splits.find_val(folder) if config.data.split else folder / splits.VAL
        if listed.exists():
            if listed.parent != folder:
                log.say(f"validation list: {listed}")
            self.val = splits.read_split(listed, self.index, labelled=True, notes=notes)
        else:
            log.say(f"{folder} has no val.txt: no mIoU is known, and the last checkpoint of a stage is the teacher")
        self.split = folder
        self.supervised_epochs = config.train.supervised_epochs or config.train.epochs
        self.stages: list[dict] = []
        self.controlled: dict | None = None

    def _name_unused(self, folder: Path) -> None:
        """Says which folders of unlabelled images a list of the user's passes over."""
        used = {sample.key.partition("/")[0] for sample in self.unlabelled}
        for name in sorted(self.index.unlabelled.keys() - used):
            self.notes.warn(f"{folder / 'unlabeled.txt'} names no image of --data.unlabelled "
                            f"{self.index.place(name) / name}, so "
                    f"none is used; they are named {name}/...")

    def preflight(self) -> None:
        """Refuses what would fail only after hours of training."""
        model = self.config.model
        network = network_of(model, len(self.index.classes))
        preflight.preflight(
            self.config, lists={"labeled.txt": self.labelled, "unlabeled.txt": self.unlabelled, "val.txt": self.val},
            weights=checkpoint.size_bytes(network.state_dict()), notes=self.notes,
            twins={self.index.entries[image].key: number for image, number in self.index.twins.items()},
            checks=[self._check_lists, lambda: start_from(network, model, self.index.classes)])

    def refuse_warnings(self) -> None:
        """Refuses what the preparation, the lists and the checks warned of."""
        Notes(warnings=list(dict.fromkeys([*indices.warned(self.index), *self.notes.warnings]))).refuse()

    def _check_lists(self) -> None:
        folder = self.split
        least = METHODS[self.config.method].unlabelled
        if len(self.unlabelled) < least:
            raise UserError(f"{folder / 'unlabeled.txt'}: {counted(len(self.unlabelled), 'image')}, and --method "
                            f"{self.config.method} needs {least}; add images, or choose another method")
        pixels = {entry.key: sum(entry.class_pixels or ()) for entry in self.index.entries.values()}
        for name, samples in (("labeled.txt", self.labelled), ("val.txt", self.val)):
            if samples and not any(pixels[sample.key] for sample in samples):
                raise UserError(f"{folder / name}: every pixel of its masks is 255 (ignore); nothing can be learned or scored")

    def given(self) -> list[Sample]:
        """The unlabelled samples that have a mask in `--pseudo-labels`, with it."""
        config, out = self.config, self.config.out / "given"
        began = any(self._folder("1-retrain").glob("*"))
        distributed.on_main(self.here, lambda: given_labels.check(self.unlabelled, config.pseudo_labels, self.index, out,
                                                           exclude=config.exclude, began=began))
        return given_labels.attach(self.unlabelled, out)

    def train(self, name: str, step: type[Step], *lists: Sequence[Sample], epochs: int | None = None, keep_thirds: bool = False,
              key: int | None = None) -> Trained:
        """See `Stages`."""
        key = key if key is not None else int(re.match(r"\d+", name)[0])
        epochs, train = epochs or self.config.train.epochs, self.config.train
        streams = step.streams(self.config, *lists)
        per_epoch = stage_samplers(streams, train.batch_global, seed=self.config.seed, stage=key)[0].steps_per_epoch
        thirds = tuple(max(1, epoch) * per_epoch for epoch in (epochs // 3, 2 * epochs // 3, epochs))
        validate_epochs = max(train.validate_every, math.ceil(train.validate_min_steps / per_epoch))
        schedule = Schedule(steps=epochs * per_epoch, validate_steps=validate_epochs * per_epoch,
                            keep_steps=thirds if keep_thirds else ())
        entries = " + ".join(str(len(stream.samples)) for stream in streams)
        what = f"train on {entries} entries, {epochs} epochs of {per_epoch} steps"
        self.stages.append(self._once(name, what, lambda: self._fit(name, step, lists, schedule, key)))
        place = self._folder(name)
        return Trained(best=place / "best.pt", thirds=tuple(place / f"third-{i}.pt" for i in (1, 2, 3)) if keep_thirds else ())

    def control(self) -> None:
        """Trains on the labels alone for as many steps, validated as often, as the last stage."""
        last = next(stage for stage in reversed(self.stages) if "validate_steps" in stage)
        schedule = Schedule(steps=last["steps"], validate_steps=last["validate_steps"])
        what = f"train on the labels alone for as many steps as {last['name']}"
        self.controlled = self._once("control", what, lambda: self._fit(
            "control", Supervised, (few_twice(self.labelled),), schedule, CONTROL))

    def select(self, name: str, checkpoints: Sequence[Path], samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
        """See `Stages`."""
        place = self._folder(name)

        def do() -> dict:
            entries = {entry.key: entry for entry in self.index.entries.values()}
            lines = [splits.line(entries[sample.key]) for sample in samples]
            mean = reliability.select(self._opening(checkpoints, samples, "none"), samples, lines, self.here, out=place, title=name,
                                      config=self.config.label, data=self.config.data)
            return {"mean_reliability": mean}

        self.stages.append(self._once(name, f"rank {len(samples)} images by the agreement of {len(checkpoints)} checkpoints", do))
        return tuple(splits.read_split(place / file, self.index, labelled=False)
                     for file in ("reliable_ids.txt", "unreliable_ids.txt"))

    def label(self, name: str, checkpoint: Path, samples: Sequence[Sample]) -> list[Sample]:
        """See `Stages`."""
        config, place = self.config, self._folder(name)

        def do() -> dict:
            opening = self._opening([checkpoint], samples, config.label.tta)
            labelled = labels.label(opening, samples, self.here, config=config.label, data=config.data,
                                    out=place, title=name)
            return {"images": labelled.images, "pseudo_label_miou": labelled.miou}

        what = f"label {len(samples)} images with the teacher of {checkpoint.parent.name}, {config.label.tta} views"
        self.stages.append(self._once(name, what, do))
        return [dataclasses.replace(sample, mask=str(place / labels.mask_name(sample)), strong=True)
                for sample in samples]

    def finish(self, results: dict) -> None:
        """Writes `results.json`, `examples.png` (what the first and the last network make of a few images) and the report."""
        files.write_json(self.config.out / "results.json", results)
        if self.val:
            trained = [stage["name"] for stage in self.stages if stage["steps"]]
            teachers = {name: self._teacher(self._folder(name) / "best.pt") for name in (trained[0], trained[-1])}
            spread = self.val[:: math.ceil(len(self.val) / EXAMPLES)]
            write_examples(self.config.out / "examples.png", spread, teachers, self.here.device)
        out = self.config.out
        try:
            write_report(out, out / "report", most_pictures=PICTURES)
        except Exception as error:  # a page about the run is no reason to lose the run
            log.say(f"no report was written ({' '.join(str(error).split())[:300] or type(error).__name__}); `stpp report {out}` "
                    "tries again")
        else:
            log.say(f"report: {out / 'report' / 'index.html'}")

    def _fit(self, name: str, step: type[Step], lists: Sequence[Sequence[Sample]], schedule: Schedule, key: int) -> dict:
        network = fresh_network(self.config, self.here, self.index.classes, stage=key)
        trainer = Trainer(self.config, self.here, step(network, self.config), step.streams(self.config, *lists), key=key,
                          title=name, classes=self.index.classes, folder=self._folder(name), schedule=schedule,
                          validate=self._validated if self.val else None)
        result = trainer.run()
        if self.here.is_main and result.iou:
            write_scores(self._folder(name) / SCORES, images=len(self.val), miou=result.miou, iou=result.iou)
        return {"miou": result.miou, "best_step": result.step, "steps": result.steps,
                "validate_steps": schedule.validate_steps, "seconds": round(result.seconds, 1)}

    def _validated(self, network: torch.nn.Module) -> Scores:
        """Scores of a network on the validation list."""
        watch = Watch(self.val, self._watched(), len(self.index.classes))
        matrix = evaluate(self._eager(network), self.val, self.here, self.config.data,
                          seen=watch.see if self.here.is_main else None)
        iou = dict(zip(self.index.classes, (100 * iou_per_class(matrix)).tolist(), strict=True))
        return Scores(miou=mean_iou(matrix), iou=iou, pictures=watch.pictures)

    def _watched(self) -> list[int]:
        """Positions of a few validation images, spread over those that this rank evaluates anyway."""
        mine = sorted(position for batch in loader.native_share(self.val, self.here) for position in batch)
        return mine[:: math.ceil(len(mine) / WATCHED) or 1]

    def _opening(self, paths: list[Path], samples: list[Sample], mode: str) -> several.Open:
        backend = self.config.label.backend
        if backend == "auto" and self.config.deterministic:
            backend = "eager"  # the choice depends on the threads, and so on the number of ranks
        pixels = sum(sample.width * sample.height for sample in samples) // len(samples)
        return several.from_paths(paths, self.here.device, mode=mode, backend=backend,
                                   precision=self.config.train.precision, image_px=pixels,
                                   teachers=METHODS[self.config.method].predictors)

    def _teacher(self, path: Path) -> EagerTeacher:
        return self._eager(load_network(path)[0])

    def _eager(self, network: torch.nn.Module) -> EagerTeacher:
        return EagerTeacher(network, num_classes=len(self.index.classes), device=self.here.device,
                            dtype=autocast_dtype(self.config.train.precision, self.here.device))

    def _folder(self, name: str) -> Path:
        return self.config.out / "stages" / name

    def _once(self, name: str, what: str, do: Callable[[], dict]) -> dict:
        """The record of a stage: read if it is done, else made by `do` and written as DONE.json."""
        done = self._folder(name) / "DONE.json"
        if done.exists():
            record = json.loads(done.read_text(encoding="utf-8"))
            log.say(f"[{name}] done before: {_outcome(record)}")
            return record
        log.say(f"[{name}] {what}")
        started = time.monotonic()
        try:
            record = {"name": name, "miou": None, "steps": 0, "seconds": 0.0} | do()
        except torch.OutOfMemoryError as error:
            what = str(error).splitlines()[0][:120]
            raise UserError(f"[{name}] out of memory on the device ({what}); --train.accumulate "
                            f"{2 * self.config.train.accumulate} halves the images of a training pass, a lower "
                            "--label.batch-pixels those of a labelling pass; begin again with another --out") from error
        record["seconds"] = record["seconds"] or round(time.monotonic() - started, 1)
        distributed.on_main(self.here, lambda: files.write_json(done, record))
        log.say(f"[{name}] {_outcome(record)}")
        return record


def summary(results: dict) -> str:
    """The final table: what each stage ended with."""
    rows = [("stage", "mIoU", "steps", "seconds")]
    for stage in results["stages"] + [results[key] for key in ("control",) if key in results]:
        miou = "" if stage["miou"] is None else f"{stage['miou']:.2f}"
        if stage.get("pseudo_label_miou") is not None:
            miou = f"(labels {stage['pseudo_label_miou']:.2f})"
        rows.append((stage["name"], miou, stage["steps"] or "", f"{stage['seconds']:.0f}"))
    return "\n" + log.table(rows)


def _outcome(record: dict) -> str:
    parts = []
    if record["miou"] is not None:
        parts.append(f"mIoU {record['miou']:.2f} at step {record['best_step']}")
    if record.get("pseudo_label_miou") is not None:
        parts.append(f"mIoU {record['pseudo_label_miou']:.2f} against the masks of these images")
    if "mean_reliability" in record:
        parts.append(f"mean reliability {record['mean_reliability']:.3f}")
    return ", ".join([*parts, f"{record['seconds']:.0f} s"])


def _prepared_index(config: Config, here: World) -> Index:
    """The index of the data set, made or renewed by rank 0 where it is missing or stale."""
    data = config.data
    folder = data.index or config.out / "index"
    settings = {"layout": data.layout, "images": data.images, "masks": data.masks, "classes": data.classes,
                "mask_map": data.mask_map, "exif": data.exif, "unlabelled": data.unlabelled,
                "follow_links": data.follow_links}

    def renew() -> None:
        if indices.is_stale(folder, data.root, **settings):
            log.say(f"prepare: reading {data.root}")
            indices.prepare(data.root, folder, strict=config.strict, **settings)

    distributed.on_main(here, renew)
    return indices.load(folder)
