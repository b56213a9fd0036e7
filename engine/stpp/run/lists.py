"""Lists of a run: labelled, unlabelled, validation and held-out images."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from stpp import distributed, files, log
from stpp.config import Config
from stpp.dataset import splits
from stpp.dataset.entries import Index
from stpp.dataset.notes import Notes, counted
from stpp.distributed import World
from stpp.errors import UserError
from stpp.loading.sample import Sample
from stpp.methods import METHODS
from stpp.run.folder import has_begun

HELD_OUT = "held-out.txt"
"""File in the run folder that lists the labelled images held out by `--advise.share`."""


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Samples of a run's lists."""

    folder: Path
    """Folder of labeled.txt and unlabeled.txt."""
    labelled: list[Sample]
    unlabelled: list[Sample]
    """Unlabelled samples; empty if the method uses none."""
    val: list[Sample]
    """Validation samples; empty without a validation list."""
    held_out: list[Sample]
    """Labelled samples for calibration: those held out by `--advise.share`, or the validation samples."""

    def digest(self) -> str:
        """Computes a digest of all lists, in their order."""
        lists = (self.labelled, self.unlabelled, self.val, self.held_out)
        keys = [[sample.key for sample in samples] for samples in lists]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]

    def check(self, method: str, index: Index) -> None:
        """Checks that the method can use the lists.

        Raises:
            UserError: too few unlabelled images, or labelled or validation masks without a counted pixel.
        """
        needed = METHODS[method].unlabelled
        if len(self.unlabelled) < needed:
            raise UserError(f"{self.folder / 'unlabeled.txt'}: {counted(len(self.unlabelled), 'image')}, and "
                            f"--method {method} needs {needed}; add images, lower --data.fraction, or choose "
                            "--method supervised")
        for name, samples in (("labeled.txt", self.labelled), ("val.txt", self.val)):
            if samples and not any(map(any, index.class_pixels(samples))):
                raise UserError(f"{self.folder / name}: every pixel of its masks is 255 (ignore); nothing "
                                "can be learned or scored")


def read(config: Config, world: World, index: Index, notes: Notes) -> Lists:
    """Reads the lists of `--data.split`, or of a split that rank 0 draws into the run's folder.

    Raises:
        UserError: a list is missing, or names an image that is not in the index.
    """
    folder = config.data.split or config.out / "split"
    if config.data.split is None:
        distributed.on_main(world, lambda: splits.make_split(
            index, folder, fraction=config.data.fraction, seed=config.data.split_seed, val=config.data.val,
            notes=notes, replace=not has_begun(config.out)))
    labelled = splits.read_split(folder / "labeled.txt", index, labelled=True, notes=notes)
    held_out: list[Sample] = []
    if config.advise.share:
        labelled, held_out = splits.held_out(labelled, config.advise.share, config.seed)
        distributed.on_main(world, lambda: _write(config.out / HELD_OUT, held_out, index))
    unlabelled: list[Sample] = []
    if METHODS[config.method].unlabelled:
        path = folder / splits.UNLABELED
        if config.data.split or path.stat().st_size:  # a drawn list is empty if every image is labelled
            unlabelled = splits.read_split(path, index, labelled=False, notes=notes)
        _warn_of_unused(folder, unlabelled, index, notes)
    val: list[Sample] = []
    listed = splits.find_val(folder) if config.data.split else folder / splits.VAL
    if listed.exists():
        if listed.parent != folder:
            log.say(f"validation list: {listed}")
        val = splits.read_split(listed, index, labelled=True, notes=notes)
    else:
        log.say(f"{folder} has no val.txt: no mIoU is computed, and the last checkpoint of a stage is the "
                "teacher")
    return Lists(folder=folder, labelled=labelled, unlabelled=unlabelled, val=val, held_out=held_out or val)


def _write(path: Path, samples: list[Sample], index: Index) -> None:
    files.write_text(path, "".join(map(splits.line, index.entries_of(samples))))


def _warn_of_unused(folder: Path, unlabelled: list[Sample], index: Index, notes: Notes) -> None:
    """Warns of folders of unlabelled images of which a user's list names no image."""
    used = {sample.key.partition("/")[0] for sample in unlabelled}
    for name in sorted(index.unlabelled.keys() - used):
        notes.warn(f"{folder / 'unlabeled.txt'} names no image of --data.unlabelled "
                   f"{index.place(name) / name}, so none is used; they are named {name}/...")
