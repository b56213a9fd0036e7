"""Prediction on single images, for `stpp.load` and `stpp predict`.

For many images use `stpp label`, which reads ahead, makes batches and can resume. H W: pixels.
"""

import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stpp.errors import UserError
from stpp.images import storage
from stpp.images.image_file import DECODE_ERRORS, MAX_PIXELS, orientation, upright
from stpp.images.pixels import NOT_FINITE, BadImage, colours, normalised
from stpp.images.planning import examine_alone
from stpp.images.reading import Reading, upright_pixels
from stpp.images.sources import FolderSource, Item
from stpp.inference import exif_rule, views
from stpp.inference.open import Predictor, open_predictor
from stpp.models.trained import load_network


class ImagePredictor:
    """Trained network that predicts masks of images.

    Args:
        network: open predictor.
        classes: names in the order of their ids.
        device: device of the network.
        mode: test-time augmentation, key of `views.VIEWS`.
        max_pixels: maximum pixels of an image; larger images are rejected, because they need much memory.
        exif: turn images upright by their EXIF orientation; should be the rule of the training images.
    """

    def __init__(self, network: Predictor, classes: Sequence[str], device: torch.device, *, mode: str,
                 max_pixels: int, exif: bool = True):
        self.classes, self.mode, self.max_pixels, self.exif = tuple(classes), mode, max_pixels, exif
        self._network, self._device = network, device

    def predict(self, image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """Predicts the mask of an image.

        Args:
            image: path of an image file; an image opened with PIL; or an RGB array, uint8 [H, W, 3]. Files
                and PIL images are read by the rules of `stpp.images.reading` (turned upright by their EXIF
                orientation unless `exif` is False), arrays are used as they are.

        Returns:
            uint8 [H, W]: class ids, indices into `classes`.

        Raises:
            UserError: the image cannot be read, or has too many pixels; names the file.
            TypeError, ValueError: an object of another type, or an array of another dtype or shape.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"image is an array {image.dtype} {image.shape}; expected uint8 [H, W, 3]: "
                                 "red, green, blue")
            self._check_size(image.shape[1], image.shape[0])
            return self._mask_of_object(image)
        if isinstance(image, Image.Image):
            return self._mask_of_object(self._of_pil(image))
        if not isinstance(image, (str, os.PathLike)):
            raise TypeError(f"image is a {type(image).__name__}; expected a path, a PIL image or a uint8 "
                            "array [H, W, 3]")
        try:
            return self.mask(self.read(Item(key="", source=os.fspath(image), file=os.path.abspath(image)))[0])
        except BadImage as bad:
            raise UserError(f"{image}: {bad}") from None

    def read(self, item: Item) -> tuple[np.ndarray, Reading]:
        """Reads an image of a corpus by the network's EXIF rule: colours, uint8 [H, W, 3]; and its reading.

        Raises:
            BadImage: it cannot be read, has too many pixels, or an invalid name for a mask.
        """
        return read(item, exif=self.exif, max_pixels=self.max_pixels)

    @torch.inference_mode()
    def mask(self, colours_HWC: np.ndarray) -> np.ndarray:
        """Predicts class ids, uint8 [H, W], of colours, uint8 [H, W, 3].

        Raises:
            BadImage: the network's answer is not finite.
        """
        images_NCHW = _network_input(colours_HWC, self._device)
        masks_NHW, finite_N = views.finite_masks(self._network, images_NCHW, self.mode)
        if not finite_N.all():
            raise BadImage(NOT_FINITE)
        return masks_NHW[0].cpu().numpy()

    @torch.inference_mode()
    def scored(self, colours_HWC: np.ndarray) -> tuple[np.ndarray, float]:
        """Predicts class ids, as `mask`, and their mean confidence, 0 to 1.

        Raises:
            BadImage: the network's answer is not finite.
        """
        images_NCHW = _network_input(colours_HWC, self._device)
        sums_NCHW = views.accumulate(self._network, images_NCHW, self.mode)
        masks_NHW, confidence_N, _ = views.masks_of_sums(sums_NCHW, tuple(images_NCHW.shape[-2:]))
        if not math.isfinite(confidence_N[0]):
            raise BadImage(NOT_FINITE)
        return masks_NHW[0].cpu().numpy(), float(confidence_N[0])

    def as_shown(self, mask_HW: np.ndarray, item: Item) -> np.ndarray:
        """Turns the mask of an image as annotation tools and browsers show the image: upright."""
        if self.exif:
            return mask_HW
        reading = examine_alone(item, max_pixels=self.max_pixels, exif=True).reading
        return np.ascontiguousarray(upright(mask_HW, reading.orientation))

    def _mask_of_object(self, colours_HWC: np.ndarray) -> np.ndarray:
        try:
            return self.mask(colours_HWC)
        except BadImage as bad:
            raise UserError(f"image: {bad}") from None

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise UserError(f"image has {width}x{height} pixels, more than max_pixels {self.max_pixels}")

    def _of_pil(self, image: Image.Image) -> np.ndarray:
        self._check_size(image.width, image.height)
        try:
            before = orientation(image)
            colours_HWC = colours(image)
            # Loading drops a TIFF's tag, and may add one that follows a PNG's pixels.
            turn = max(before, orientation(image))
        except (BadImage, *DECODE_ERRORS) as error:
            raise UserError(f"image: {' '.join(str(error).split()) or type(error).__name__}; it cannot be "
                            "decoded") from error
        return upright(colours_HWC, turn) if self.exif else colours_HWC


def read(item: Item, *, exif: bool, max_pixels: int) -> tuple[np.ndarray, Reading]:
    """Reads an image of a corpus: colours, uint8 [H, W, 3]; and its reading.

    Raises:
        BadImage: it cannot be read, has too many pixels, or an invalid name for a mask.
    """
    planned = examine_alone(item, max_pixels=max_pixels, exif=exif)
    if planned.error is not None:
        raise BadImage(planned.error)
    try:
        return upright_pixels(item.read(), planned.reading), planned.reading
    except OSError as error:
        raise BadImage(storage.describe_error(error)) from None


def sample_images(folder: Path, device: torch.device, *, exif: bool) -> Iterator[torch.Tensor]:
    """Yields normalised images [1, 3, H, W] of a folder and its sub-folders, read as for labelling.

    Raises:
        UserError: immediately, if there is none; while iterating, for one that cannot be read.
    """
    items = list(FolderSource(str(folder.absolute())).items()) if folder.is_dir() else []
    if not items:
        raise UserError(f"--sample {folder}: no images found")

    def load(item: Item) -> torch.Tensor:
        try:
            return _network_input(read(item, exif=exif, max_pixels=MAX_PIXELS)[0], device)
        except BadImage as bad:
            raise UserError(f"--sample {item.file}: {bad}") from None

    return map(load, items)


def _network_input(colours_HWC: np.ndarray, device: torch.device) -> torch.Tensor:
    """Normalises uint8 [H, W, 3] to float32 [1, 3, H, W], channels_last, on the device."""
    images_NHWC = torch.from_numpy(np.ascontiguousarray(normalised(colours_HWC)))[None]
    return images_NHWC.to(device).permute(0, 3, 1, 2)


def open_image_predictor(path: str | os.PathLike, *, mode: str, device: torch.device, precision: str,
                         max_pixels: int, trust: bool, output_stride: int | None = None,
                         view_px: int | None = None, exif: bool | None = None) -> ImagePredictor:
    """Opens a predictor for single images: a checkpoint in eager PyTorch, or an engine.

    Args:
        path: best.pt or third-*.pt of a run, a published state dict, or an engine folder.
        trust: run an engine that this user did not build.
        output_stride, view_px: see `load_network`.
        exif: turn images upright by their EXIF orientation; None: the rule of the training images.

    Raises:
        UserError: the network does not exist, does not run here, or was trained with another rule than
            `exif`.
        ValueError: an unknown mode or output stride.
    """
    if mode not in views.VIEWS:
        raise ValueError(f"tta is {mode!r}; expected one of {', '.join(views.VIEWS)}")
    path = Path(path)
    load = partial(load_network, output_stride=output_stride, view_px=view_px)
    network = open_predictor(path, load=load, device=device, backend="auto" if path.is_dir() else "eager",
                             precision=precision, trust=trust)
    return ImagePredictor(network, network.identity.classes, device, mode=mode, max_pixels=max_pixels,
                          exif=exif_rule.resolve([path], exif))
