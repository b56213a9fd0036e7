"""What the loaders read (samples), what a step is fed (streams), and what arrives (batches)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stpp.images.reading import Reading

View = Literal["sample", "weak", "strong"]


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
class Preference:
    """Preference for images and crops that show rare classes: which places of an epoch are filled by class,
    and with what. C: classes."""

    share: float
    """Share of the places that are filled by class."""
    chances_C: np.ndarray
    """float64: probability that such a place is filled by this class; they add up to 1."""
    members: tuple[np.ndarray, ...]
    """By class: int64 positions, in the list of samples, of the images that show it."""
    spots: tuple[Mapping[int, np.ndarray], ...]
    """By sample: some pixels of each class that it shows, float32 [n, 2]: y and x as shares of height and
    width."""
    crop_tries: int
    """Crops drawn for such a place, at most, until one shows the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """A list of samples as a step is fed it: one batch a pass, decoded and cropped once, seen in one or
    several views."""

    samples: Sequence[Sample]
    views: tuple[View, ...] = ("sample",)
    """Appearances of the one crop, in the order of `Batch.views`; "sample" is strong where the sample says
    so."""
    box: Literal["erase", "paste"] = "erase"
    """Use of the box that a strong view draws: erased by the loader (cutout), or pasted by the step
    (CutMix)."""
    masked: bool = True
    """Whether the step needs the samples' masks. Without, an unlabelled image needs none anywhere."""
    number: int = 0
    """Place among the streams of a step: it keys the random numbers, so that no two streams share them."""
    preference: Preference | None = None
    """For images and crops with rare classes; None: every image once an epoch, and the first crop drawn."""

    def __post_init__(self):
        if self.masked and (bare := next((sample for sample in self.samples if sample.mask is None), None)):
            raise ValueError(f"sample {bare.key!r} has no mask, expected one for every sample of a stream "
                             "with masks")
        if self.box == "erase" and self.masked and len(self.views) > 1 and set(self.views) != {"weak"}:
            raise ValueError(f"views {self.views} of one mask: only boxes of a single view can be erased")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Decoded samples on the device. N: samples, V: views, H and W: pixels."""

    views: tuple[torch.Tensor, ...]
    """Images of each view: float32 [N, 3, H, W], channels_last, normalised with ImageNet mean and standard
    deviation."""
    labels_NHW: torch.Tensor | None
    """uint8 class indices, 255 is ignore; None where the stream has no masks."""
    indices: np.ndarray
    """int64 [N]: positions in the list of samples that the loader was given."""
    boxes_VN4: torch.Tensor | None = None
    """int32: y, x, height, width of the box to be pasted in each view, zeros for none; None where boxes are
    erased."""
    shown_N4: torch.Tensor | None = None
    """int32: y, x, height, width of what is no padding."""
    step: int = 0
    """The optimiser step that the batch belongs to."""
    epoch: int = 0

    @property
    def images_NCHW(self) -> torch.Tensor:
        """The first view."""
        return self.views[0]
