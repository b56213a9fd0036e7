"""Masks of single images by a trained network, for `stpp.load` and `stpp predict`.

Many images are the work of `stpp label`: it reads ahead, makes batches, and goes on after an interruption.
H W: pixels.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stpp.errors import UserError
from stpp.images import storage
from stpp.images.batching import Cut, examine
from stpp.images.image_file import DECODE_ERRORS, orientation, upright
from stpp.images.pixels import BadImage, colours, decode, normalised
from stpp.images.sources import Item
from stpp.inference import views
from stpp.inference.open import Teacher, open_teacher
from stpp.models.trained import load_network


class Predictor:
    """A trained network that makes masks of images.

    Args:
        network: the network, ready.
        classes: names in the order of their ids.
        device: where the network computes.
        mode: views whose probabilities are summed, key of `views.VIEWS`.
        max_pixels: images of more pixels are refused: they need much memory.
    """

    def __init__(self, network: Teacher, classes: Sequence[str], device: torch.device, *, mode: str, max_pixels: int):
        self.classes, self.mode, self.max_pixels = tuple(classes), mode, max_pixels
        self._network, self._device = network, device

    def predict(self, image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
        """The mask of an image.

        Args:
            image: path of an image file; an image opened with PIL; or its colours, uint8 [H, W, 3] in 0..255, red, green
                and blue. Files and PIL images are turned upright by their EXIF orientation, arrays are taken as they are.

        Returns:
            uint8 [H, W]: class ids, positions in `classes`.

        Raises:
            UserError: the image cannot be read, or has too many pixels; names the file.
            TypeError, ValueError: something else than these three, or an array of another type or shape.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"image is an array {image.dtype} {image.shape}; expected uint8 [H, W, 3]: red, green, blue")
            return self.mask(image)
        if isinstance(image, Image.Image):
            return self.mask(self._of_pil(image))
        if not isinstance(image, (str, os.PathLike)):
            raise TypeError(f"image is a {type(image).__name__}; expected a path, a PIL image or a uint8 array [H, W, 3]")
        try:
            return self.mask(self.read(Item(key="", source=os.fspath(image), file=os.path.abspath(image))))
        except BadImage as bad:
            raise UserError(f"{image}: {bad}") from None

    def read(self, item: Item) -> np.ndarray:
        """Colours of an image of a corpus, upright: uint8 [H, W, 3].

        Raises:
            BadImage: it cannot be read, has too many pixels, or a name that no mask can have.
        """
        looked = examine(item, Cut(max_batch=1, batch_pixels=1, max_pixels=self.max_pixels, exif=True))
        if looked.error is not None:
            raise BadImage(looked.error)
        try:
            return upright(decode(item.read()), looked.header.orientation)
        except OSError as error:
            raise BadImage(storage.why(error)) from None

    @torch.inference_mode()
    def mask(self, colours_HWC: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to class ids, uint8 [H, W]."""
        images_NHWC = torch.from_numpy(np.ascontiguousarray(normalised(colours_HWC)))[None]
        images_NCHW = images_NHWC.to(self._device).permute(0, 3, 1, 2)
        return views.masks(self._network.logits, images_NCHW, self.mode, self._network.num_classes)[0].cpu().numpy()

    def _of_pil(self, image: Image.Image) -> np.ndarray:
        if image.width * image.height > self.max_pixels:
            raise UserError(f"image has {image.width}x{image.height} pixels, more than max_pixels {self.max_pixels}")
        try:
            found = colours(image)
            return upright(found, orientation(image))
        except (BadImage, *DECODE_ERRORS) as error:
            raise UserError(f"image: {' '.join(str(error).split()) or type(error).__name__}; it cannot be decoded") from error


def open_predictor(path: str | os.PathLike, *, mode: str, device: torch.device, precision: str, max_pixels: int,
                   trust: bool, output_stride: int | None = None) -> Predictor:
    """A predictor with the network of a checkpoint, as PyTorch runs it, or with an engine.

    Args:
        path: a best.pt or third-*.pt of a run, a published state dict, or the folder of an engine.
        trust: run an engine that this user did not build.
        output_stride: see `load_network`.

    Raises:
        UserError: there is no such network, or it does not run here.
        ValueError: an unknown mode or output stride.
    """
    if mode not in views.VIEWS:
        raise ValueError(f"tta is {mode!r}; expected one of {', '.join(views.VIEWS)}")
    path = Path(path)
    load = partial(load_network, output_stride=output_stride)
    network = open_teacher(path, load=load, device=device, backend="auto" if path.is_dir() else "eager",
                           precision=precision, trust=trust)
    return Predictor(network, network.identity.classes, device, mode=mode, max_pixels=max_pixels)
