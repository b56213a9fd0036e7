"""Samples (entries of a list), streams (input of a step) and batches (output of a loader)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from stpp.images.reading import Reading

View = Literal["sample", "weak", "strong"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Image of a list, with everything needed to decode it."""

    key: str
    """Unique name in the data set: the image's relative path without extension, with forward slashes."""
    image: str
    """Absolute path of the image."""
    mask: str | None = None
    """Absolute path of an 8-bit grayscale index PNG, or None."""
    width: int
    """Width in pixels, after the EXIF rule of the data set."""
    height: int
    """Height in pixels, after the EXIF rule of the data set."""
    orientation: int = 1
    """EXIF orientation that is undone to turn the image upright, see `stpp.images.reading`."""
    plain: bool = False
    """True if all decoders give the same pixels; other images are decoded by PIL."""
    strong: bool = False
    """Strong augmentation in training: True for unlabelled images with a pseudo label."""

    @property
    def reading(self) -> Reading:
        """Reading of the image."""
        return Reading(self.width, self.height, self.orientation, self.plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Preference for images and crops with rare classes: some positions of an epoch are filled by class.
    C: classes."""

    share: float
    """Share of the positions that are filled by class."""
    chances_C: np.ndarray
    """float64: probability of each class at such a position; sums to 1."""
    members: tuple[np.ndarray, ...]
    """Indices of the images that show each class, int64, in the list of samples."""
    spots: tuple[Mapping[int, np.ndarray], ...]
    """Some pixels of each class that each sample shows, float32 [n, 2]: y and x relative to height and
    width."""
    crop_tries: int
    """Maximum crops drawn at such a position until one shows the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Input stream of a step: a list of samples, one batch per pass, decoded and cropped once, in one or
    several views."""

    samples: Sequence[Sample]
    views: tuple[View, ...] = ("sample",)
    """Views of the crop, in the order of `Batch.views`; "sample" is strong if `Sample.strong` is set."""
    box: Literal["erase", "paste"] = "erase"
    """Use of a strong view's box: erased by the loader (Cutout), or pasted by the step (CutMix)."""
    masked: bool = True
    """True if the step needs the samples' masks; else unlabelled images may be without."""
    number: int = 0
    """Number of the stream in its step; key of the random numbers, which streams do not share."""
    preference: Preference | None = None
    """Preference for rare classes; None: every image once per epoch, and the first crop drawn."""

    def __post_init__(self):
        if self.masked and (bare := next((sample for sample in self.samples if sample.mask is None), None)):
            raise ValueError(f"sample {bare.key!r} has no mask, expected one for every sample of a stream "
                             "with masks")
        if self.box == "erase" and self.masked and len(self.views) > 1 and set(self.views) != {"weak"}:
            raise ValueError(f"views {self.views} of one mask: only boxes of a single view can be erased")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Batch of decoded samples on the device. N: samples, V: views, H and W: pixels."""

    views: tuple[torch.Tensor, ...]
    """Images of each view: float32 [N, 3, H, W], channels_last, normalised with ImageNet mean and standard
    deviation."""
    labels_NHW: torch.Tensor | None
    """uint8 class indices, 255 is ignore; None if the stream has no masks."""
    indices: np.ndarray
    """int64 [N]: indices of the samples in the stream's list."""
    boxes_VN4: torch.Tensor | None = None
    """int32: y, x, height, width of the box to paste in each view, zeros for none; None if boxes are
    erased."""
    shown_N4: torch.Tensor | None = None
    """int32: y, x, height, width of the part without padding; None if boxes are erased."""
    step: int = 0
    """Optimiser step of the batch."""
    epoch: int = 0

    @property
    def images_NCHW(self) -> torch.Tensor:
        """Images of the first view."""
        return self.views[0]
