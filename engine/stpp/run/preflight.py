"""Preflight checks: report all problems that would stop a run hours later, before its first step."""

import shutil
from collections.abc import Callable, Mapping, Sequence

from stpp.config import Config
from stpp.dataset.notes import Notes
from stpp.errors import UserError
from stpp.images.image_file import opened
from stpp.loading.sample import Sample
from stpp.methods import METHODS

SAMPLED = 16
"""Samples of a list whose files are decoded."""
MASK_BITS = 1.0
"""Estimated bits per pixel of a stored pseudo label; an upper bound for photographs."""


def preflight(config: Config, *, lists: dict[str, Sequence[Sample]], weights: int,
              checks: Sequence[Callable[[], None]], twins: Mapping[str, int] | None = None,
              notes: Notes | None = None) -> None:
    """Runs all checks.

    Args:
        lists: samples by the name of their list.
        weights: bytes of one network.
        checks: further checks, each raising UserError.
        twins: number of the group of identical images, by the key of a sample in one.
        notes: collects warnings.

    Raises:
        UserError: names all problems.
    """
    _warn_of_overlaps(lists, twins or {}, notes or Notes())
    problems = []
    unlabelled = lists.get("unlabeled.txt", ())
    for check in (*checks, lambda: _room(config, weights, unlabelled), lambda: _labelable(config, unlabelled),
                  *(lambda name=name, samples=samples: _readable(name, samples)
                    for name, samples in lists.items())):
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
    """Checks that the side of a crop is a multiple of a transformer's patches.

    Raises:
        UserError: names the nearest valid sides.
    """
    if surplus := crop_px % multiple:
        sides = [str(side) for side in (crop_px - surplus, crop_px - surplus + multiple) if side]
        raise UserError(f"--augment.crop-px {crop_px}: {backbone} has patches of {multiple} pixels; choose "
                        f"{' or '.join(sides)}")


OVERLAPS = (("labeled.txt", "val.txt", "the validation mIoU includes training images"),
            ("unlabeled.txt", "val.txt", "the validation mIoU includes images trained on with pseudo labels"),
            ("labeled.txt", "unlabeled.txt",
             "they are trained on twice, with their masks and with pseudo labels"))


def _warn_of_overlaps(lists: dict[str, Sequence[Sample]], twins: Mapping[str, int], notes: Notes) -> None:
    for first, second, what in OVERLAPS:
        known = {sample.key for sample in lists.get(first, ())}
        both = [sample.image for sample in lists.get(second, ()) if sample.key in known]
        if both:
            notes.warn(f"{len(both)} images of {second} are in {first} too, the first: {both[0]}; {what}")
        copied = {twins[sample.key]: sample.image for sample in lists.get(first, ()) if sample.key in twins}
        copies = [sample for sample in lists.get(second, ())
                  if sample.key not in known and twins.get(sample.key) in copied]
        if copies:
            notes.warn(f"{len(copies)} images of {second} are copies of images of {first} (the first: "
                       f"{copies[0].image} of {copied[twins[copies[0].key]]}); {what}")


def _room(config: Config, weights: int, unlabelled: Sequence[Sample]) -> None:
    """Checks the disk space for checkpoints and pseudo labels; a resumed run has already written a part."""
    masks = sum(sample.width * sample.height for sample in unlabelled) * MASK_BITS / 8
    method = METHODS[config.method]
    on_labels = config.control + (method.consistency and config.train.from_teacher)
    copies = method.checkpoints + METHODS["supervised"].checkpoints * on_labels
    needed, free = copies * weights + masks, shutil.disk_usage(config.out).free
    if needed > free:  # listing what may be millions of masks is slow
        needed -= sum(path.stat().st_size for path in config.out.glob("stages/**/*") if path.is_file())
    if needed > free:
        raise UserError(f"--out {config.out}: about {needed / 2**20:.0f} MiB are needed for checkpoints and "
                        f"pseudo labels, and the disk has {free / 2**20:.0f}; make room or choose another "
                        "--out")


def _labelable(config: Config, unlabelled: Sequence[Sample]) -> None:
    """Checks for images that are too large to label: in a labelling stage they would end the run."""
    most = config.label.max_pixels
    large = [sample for sample in unlabelled if sample.width * sample.height > most]
    if large and METHODS[config.method].labels:
        largest = max(sample.width * sample.height for sample in large)
        first = large[0]
        raise UserError(f"unlabeled.txt: {len(large)} images have more than --label.max-pixels {most} (the "
                        f"first: {first.image}, {first.width}x{first.height}); make them smaller, take them "
                        f"off the list, or, if the memory allows it, give --label.max-pixels {largest}")


def _readable(name: str, samples: Sequence[Sample]) -> None:
    """Decodes a sample of the files of a list."""
    for sample in samples[:: -(-len(samples) // SAMPLED) or 1]:
        for path in filter(None, (sample.image, sample.mask)):
            try:
                with opened(path) as image:
                    image.load()
            except UserError as error:
                raise UserError(f"{name}: {error}, then prepare the index again") from None
