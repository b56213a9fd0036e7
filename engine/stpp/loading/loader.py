"""Chooses the loader: DALI where it is installed, else the reference in PIL and NumPy."""

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from stpp.config import DataConfig
from stpp.distributed import World, threads_per_rank
from stpp.errors import UserError
from stpp.images.batches import has_dali
from stpp.loading.sample import Batch, Sample
from stpp.loading.sampler import equal_size_batches

MAX_BATCH = 8
"""Images of one batch at native size, at most."""
_noticed = False


def pick(name: str = "auto") -> ModuleType:
    """The module whose `train_batches` and `eval_batches` are to be used.

    Args:
        name: "dali"; "reference"; or "auto", which takes DALI if it is installed, else the reference, saying so once on
            stderr, because it is slower and its colours differ a little (docs/augmentation.md).

    Raises:
        UserError: "dali" is asked for but not installed.
        ValueError: another name.
    """
    if name not in ("auto", "dali", "reference"):
        raise ValueError(f"name is {name!r}, expected 'auto', 'dali' or 'reference'")
    if name != "reference":
        if has_dali():
            from stpp.loading import dali

            return dali
        if name == "dali":
            raise UserError(
                "--data.loader dali: NVIDIA DALI is not installed; pip install stpp[cuda12] (or stpp[cuda13]), or use "
                "--data.loader reference"
            )
        _notice()
    from stpp.loading import reference

    return reference


def native_batches(samples: Sequence[Sample], here: World, data: DataConfig) -> Iterator[Batch]:
    """This rank's share of `samples` at native size, without augmentation, in batches of images of equal size.

    Every sample is in one batch of one rank.
    """
    return pick(data.loader).eval_batches(
        samples, native_share(samples, here), device=here.device, threads=threads_per_rank(here, data.threads), exif=data.exif
    )


def native_share(samples: Sequence[Sample], here: World) -> list[list[int]]:
    """This rank's batches of `native_batches`, as positions in `samples`."""
    return equal_size_batches(samples, MAX_BATCH, rank=here.rank, world=here.size)


def _notice() -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        print(
            "notice: NVIDIA DALI is not installed; images are loaded with PIL, which is slower "
            "(pip install stpp[cuda12])",
            file=sys.stderr,
        )
