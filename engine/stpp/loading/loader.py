"""Choice of the loader: DALI if installed, else the reference in PIL and NumPy."""

import sys
from collections.abc import Sequence
from types import ModuleType

from stpp.distributed import World
from stpp.images import batches
from stpp.loading.sample import Sample
from stpp.loading.sampler import equal_size_batches

MAX_BATCH = 8
"""Maximum batch size at native size."""
_noticed = False


def pick(name: str = "auto") -> ModuleType:
    """Returns the loader module, with its `train_batches`.

    Args:
        name: "dali"; "reference"; or "auto": DALI if installed, else the reference, with one notice on
            stderr, because it is slower and its colours differ a little (docs/augmentation.md).

    Raises:
        UserError: "dali" is requested but not installed.
        ValueError: another name.
    """
    if batches.pick(name) == "dali":
        from stpp.loading import dali

        return dali
    if name == "auto":
        _notice()
    from stpp.loading import reference

    return reference


def native_share(samples: Sequence[Sample], world: World) -> list[list[int]]:
    """Computes this rank's share of `samples`: batches of images of equal size, as indices; every sample is
    in one batch of one rank."""
    return equal_size_batches(samples, MAX_BATCH, rank=world.rank, world=world.size)


def _notice() -> None:
    global _noticed
    if not _noticed:
        _noticed = True
        print(
            "notice: NVIDIA DALI is not installed; images are loaded with PIL, which is slower "
            "(pip install stpp[cuda12])",
            file=sys.stderr,
        )
