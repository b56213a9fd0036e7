"""What the loaders read (samples), what a step is fed (streams), and what arrives (batches)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stpp.images.reading import Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a list, ready to be decoded."""

    key: str
    """Unique name inside its data set: the image's relative path without extension, with forward slashes."""
    image: str
    """Absolute path of the image."""
    mask: str | None = None
    """Absolute path of an 8-bit grayscale index PNG, or None."""
    width: int
    """Pixels, after the EXIF rule of the data set."""
    height: int
    """Pixels, after the EXIF rule of the data set."""
    orientation: int = 1
    """EXIF orientation that the image is turned upright from, see `stpp.images.reading`."""
    plain: bool = False
    """Whether every decoder makes the same of the image; PIL decodes what is not."""
    strong: bool = False
    """Whether training augments it strongly: True for unlabelled images with a pseudo label."""

    @property
    def reading(self) -> Reading:
        """How the image is read."""
        return Reading(self.width, self.height, self.orientation, self.plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A list of samples as a step is fed it: one batch a pass."""

    samples: Sequence[Sample]


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Decoded samples on the device. N: samples, H and W: pixels."""

    images_NCHW: torch.Tensor
    """float32, channels_last, normalised with ImageNet mean and standard deviation."""
    labels_NHW: torch.Tensor | None
    """uint8 class indices, 255 is ignore; None where a sample of the batch has no mask."""
    indices: np.ndarray
    """int64 [N]: positions in the list of samples that the loader was given."""
    step: int = 0
    """The optimiser step that the batch belongs to."""
    epoch: int = 0
