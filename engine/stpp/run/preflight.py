"""What would stop a run hours from now, found before its first step: every problem, not only the first."""

import shutil
from collections.abc import Callable, Mapping, Sequence

from stpp.config import Config
from stpp.dataset.notes import Notes
from stpp.errors import UserError
from stpp.images.image_file import opened
from stpp.loading.sample import Sample
from stpp.methods import METHODS

SAMPLED = 16
"""Images and masks of a list that are decoded."""
MASK_BITS = 1.0
"""Bits a pixel of a pseudo label on the disk, more than masks of photographs take."""


def preflight(config: Config, *, lists: dict[str, Sequence[Sample]], weights: int,
              checks: Sequence[Callable[[], None]], twins: Mapping[str, int] | None = None,
              notes: Notes | None = None) -> None:
    """Looks at everything once.

    Args:
        lists: samples by the name of their list.
        weights: bytes of one network.
        checks: further ones, each raising UserError.
        twins: by the key of a sample that has copies, a number that its copies have too.
        notes: takes what there is to warn of.

    Raises:
        UserError: names every problem found.
    """
    _warn_of_overlaps(lists, twins or {}, notes or Notes())
    problems = []
    unlabelled = lists.get("unlabeled.txt", ())
    for check in (*checks, lambda: _room(config, weights, unlabelled), lambda: _labelable(config, unlabelled),
                  *(
            lambda name=name, samples=samples: _readable(name, samples) for name, samples in lists.items())):
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems: "
                        + "; ".join(f"({i}) {text}" for i, text in enumerate(problems, 1)))


def check_crop(crop_px: int, multiple: int, backbone: str) -> None:
    """Refuses a crop whose side does not divide into a transformer's patches.

    Raises:
        UserError: names the nearest sides that do.
    """
    if surplus := crop_px % multiple:
        sides = [str(side) for side in (crop_px - surplus, crop_px - surplus + multiple) if side]
        raise UserError(f"--augment.crop-px {crop_px}: {backbone} sees patches of {multiple} pixels; choose "
                        f"{' or '.join(sides)}")


OVERLAPS = (("labeled.txt", "val.txt", "their mIoU is that of images trained on"),
            ("unlabeled.txt", "val.txt", "their mIoU is that of images whose pseudo labels were trained on"),
            ("labeled.txt", "unlabeled.txt",
             "they are trained on twice, with their masks and with pseudo labels"))


def _warn_of_overlaps(lists: dict[str, Sequence[Sample]], twins: Mapping[str, int], notes: Notes) -> None:
    for first, second, what in OVERLAPS:
        known = {sample.key for sample in lists.get(first, ())}
        both = [sample.image for sample in lists.get(second, ()) if sample.key in known]
        if both:
            notes.warn(f"{len(both)} images of {second} stand in {first} too, {both[0]} the first; {what}")
        copied = {twins[sample.key]: sample.image for sample in lists.get(first, ()) if sample.key in twins}
        copies = [sample for sample in lists.get(second, ())
                  if sample.key not in known and twins.get(sample.key) in copied]
        if copies:
            notes.warn(f"{len(copies)} images of {second} are copies of images of {first} "
                       f"({copies[0].image} of {copied[twins[copies[0].key]]} the first); {what}")


def _room(config: Config, weights: int, unlabelled: Sequence[Sample]) -> None:
    """Disk for checkpoints and pseudo labels; a run that goes on already has a part of it."""
    masks = sum(sample.width * sample.height for sample in unlabelled) * MASK_BITS / 8
    copies = METHODS[config.method].checkpoints + METHODS["supervised"].checkpoints * config.control
    needed, free = copies * weights + masks, shutil.disk_usage(config.out).free
    if needed > free:  # only then is it worth looking through what may be millions of masks
        needed -= sum(path.stat().st_size for path in config.out.glob("stages/**/*") if path.is_file())
    if needed > free:
        raise UserError(f"--out {config.out}: about {needed / 2**20:.0f} MiB are needed for checkpoints and "
                        f"pseudo labels, and the disk has {free / 2**20:.0f}; make room or choose another "
                        "--out")


def _labelable(config: Config, unlabelled: Sequence[Sample]) -> None:
    """Images that no stage could label: found there, they would end the run, and the time of earlier stages
    be lost."""
    most = config.label.max_pixels
    large = [sample for sample in unlabelled if sample.width * sample.height > most]
    if large and METHODS[config.method].labels:
        largest = max(sample.width * sample.height for sample in large)
        first = large[0]
        raise UserError(f"unlabeled.txt: {len(large)} images have more than --label.max-pixels {most} (the "
                        f"first: {first.image}, {first.width}x{first.height}); make them smaller, take them "
                        f"off the list, or, if the memory allows it, give --label.max-pixels {largest}")


def _readable(name: str, samples: Sequence[Sample]) -> None:
    """Decodes some files of a list, spread over it."""
    for sample in samples[:: -(-len(samples) // SAMPLED) or 1]:
        for path in filter(None, (sample.image, sample.mask)):
            try:
                with opened(path) as image:
                    image.load()
            except UserError as error:
                raise UserError(f"{name}: {error}, and prepare the index again") from None
