"""Preference for images with rare classes, computed by reading the masks of a list once.

Legend: C classes, N samples.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from stpp import distributed
from stpp.config import RareConfig
from stpp.distributed import World
from stpp.loading.decode import mask_of
from stpp.loading.sample import Preference, Sample

SPOTS = 16
"""Maximum pixels of a class stored per image; a crop that contains one of them shows the class."""


class MaskContent(NamedTuple):
    """Content of a mask."""

    pixels_C: np.ndarray
    """int64: pixels of each class."""
    spots: dict[int, np.ndarray]
    """See `Preference.spots`."""


def preference(samples: Sequence[Sample], num_classes: int, rare: RareConfig, world: World,
               threads: int) -> Preference | None:
    """Computes the preference for a list with masks; None if `--rare.sampling` is 0. Every rank must call it.

    The probability of a class is proportional to 1 / sqrt(its pixels in the list), among the classes that
    occur. It depends on the list alone: not on the ranks, nor on when a run was resumed.

    Args:
        samples: each with a mask; repeated samples are read once.
    """
    if not rare.sampling:
        return None
    paths = {sample.mask: sample for sample in samples}
    share = list(paths)[world.rank :: world.size]
    with ThreadPoolExecutor(threads, "stpp-masks") as pool:
        own = dict(zip(share, pool.map(lambda path: content(mask_of(paths[path]), num_classes), share),
                       strict=True))
    by_path = {path: mask for part in distributed.gather(own) for path, mask in part.items()}
    by_sample = [by_path[sample.mask] for sample in samples]
    pixels_NC = np.stack([mask.pixels_C for mask in by_sample])
    total_C = pixels_NC.sum(0)
    if not total_C.any():
        return None
    chances_C = np.where(total_C > 0, 1 / np.sqrt(np.maximum(total_C, 1)), 0.0)
    return Preference(share=rare.sampling, chances_C=chances_C / chances_C.sum(), crop_tries=rare.crop_tries,
                      members=tuple(np.flatnonzero(pixels_NC[:, i]) for i in range(num_classes)),
                      spots=tuple(mask.spots for mask in by_sample))


def content(mask_HW: np.ndarray, num_classes: int) -> MaskContent:
    """Computes the content of a mask: uint8 [H, W], 255 is no class."""
    height, width = mask_HW.shape
    pixels_C = np.bincount(mask_HW.ravel(), minlength=256)[:num_classes].astype(np.int64)
    spots = {}
    for class_id in np.flatnonzero(pixels_C).tolist():
        places = np.flatnonzero(mask_HW.ravel() == class_id)
        # Evenly spaced in row-major order, so the choice is deterministic.
        chosen = places[(np.arange(min(SPOTS, len(places))) * len(places)) // min(SPOTS, len(places))]
        y, x = np.divmod(chosen, width)
        spots[class_id] = np.stack([(y + 0.5) / height, (x + 0.5) / width], axis=1).astype(np.float32)
    return MaskContent(pixels_C, spots)
