"""The loader in PIL and NumPy: what the DALI graphs must compute, and the loader where DALI is not installed.

The same functions, fed by the same numbers, as `stpp.loading.dali`. Colours are what torchvision's ColorJitter makes of
PIL images: ImageEnhance for brightness, contrast and saturation, a shift in 8-bit HSV for hue.

Legend: N samples, H W pixels, C colours.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from stpp.config import AugmentConfig
from stpp.device import Arriving, copy_stream, on, staging
from stpp.images.masks import IGNORE
from stpp.images.pixels import normalised
from stpp.loading.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    AugmentParams,
    draw,
    noise_image,
    noise_side,
)
from stpp.loading.decode import image_of, mask_of
from stpp.loading.sample import Batch, Sample
from stpp.loading.sampler import MicroBatch

Decoded = tuple[np.ndarray, np.ndarray]
"""Image, uint8 [H, W, 3], and mask, uint8 [H, W]."""


def train_batches(
    samples: Sequence[Sample],
    micro_batches: Iterable[MicroBatch],
    *,
    augment: AugmentConfig,
    seed: int,
    stage: int,
    device: torch.device | str,
    threads: int,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Decodes, augments and normalises the given micro-batches: see `stpp.loading.dali.train_batches`.

    A pool of `threads` threads decodes and augments; batches are normalised on the device.
    """
    for sample in samples:
        if sample.mask is None:
            raise ValueError(f"sample {sample.key!r} has no mask, expected one for every sample that trains")
    _check(threads, prefetch)
    side = augment.crop_px
    noise = noise_image(noise_side(side))

    def one(sample: Sample, params: AugmentParams, row: int) -> Decoded:
        return augmented(*decoded(sample), params, row, side=side, noise=noise)

    def tasks() -> Iterator[_Task]:
        for micro in micro_batches:
            chosen = [samples[i] for i in micro.indices]
            params = draw(chosen, micro.positions, seed=seed, stage=stage, epoch=micro.epoch, crop_px=side,
                          long_side=augment.long_side)  # fmt: skip
            calls = [(one, sample, params, row) for row, sample in enumerate(chosen)]
            yield _Task(micro, (side, side), calls)

    return (
        Batch(images_NCHW=images, labels_NHW=labels, indices=it.indices, step=it.step, epoch=it.epoch)
        for it, images, labels in _pooled(tasks(), threads, prefetch, torch.device(device))
    )


def decoded(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Reads a sample's files: uint8 [H, W, 3] colours and its uint8 [H, W] mask.

    Raises:
        UserError: a file that is missing, broken, or of another size than the sample says.
    """
    return image_of(sample), mask_of(sample)


def augmented(
    image: np.ndarray, mask: np.ndarray, params: AugmentParams, row: int, *, side: int, noise: np.ndarray
) -> Decoded:
    """Applies one row of parameters.

    Args:
        image, mask: uint8 [H, W, 3] and uint8 [H, W].
        params, row: which row of which parameters.
        side: of the crop, pixels.
        noise: uint8 image that cutout boxes are filled from.

    Returns:
        uint8 [side, side, 3] image, not normalised, and uint8 [side, side] mask.
    """
    size = (int(params.resize_w[row]), int(params.resize_h[row]))
    top, left = int(params.crop_y[row]), int(params.crop_x[row])
    height, width = min(size[1] - top, side), min(size[0] - left, side)
    crop = np.zeros((side, side, 3), dtype=np.uint8)
    labels = np.full((side, side), IGNORE, dtype=np.uint8)
    # Image.fromarray wants rows in one piece, and an image turned upright is a view.
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR))
    crop[:height, :width] = resized[top : top + height, left : left + width]
    source_rows = _nearest(size[1], mask.shape[0])[top : top + height]
    labels[:height, :width] = mask[source_rows[:, None], _nearest(size[0], mask.shape[1])[left : left + width]]
    if params.flip[row]:
        crop, labels = crop[:, ::-1], labels[:, ::-1]

    if params.jitter[row] or params.gray[row] or params.blur_sigma[row] > 0:
        crop = np.array(_recolored(Image.fromarray(np.ascontiguousarray(crop)), params, row))
    y, x, box_h, box_w = params.cutout[row].tolist()
    if box_h:
        noise_y, noise_x = params.noise_offset[row] + (y, x)
        crop[y : y + box_h, x : x + box_w] = noise[noise_y : noise_y + box_h, noise_x : noise_x + box_w]
        labels[y : y + box_h, x : x + box_w] = IGNORE
    return crop, labels


def _nearest(resized: int, source: int) -> np.ndarray:
    """int64 [resized]: the source pixel under each pixel's centre; the later one where it falls on a border.

    PIL's nearest, but for the borders, where PIL follows its rounding errors.
    """
    return (2 * np.arange(resized) + 1) * source // (2 * resized)


def _recolored(image: Image.Image, params: AugmentParams, row: int) -> Image.Image:
    """Jitter, gray, blur."""
    if params.jitter[row]:
        for operation in params.jitter_order[row]:
            if operation == BRIGHTNESS:
                image = ImageEnhance.Brightness(image).enhance(float(params.brightness[row]))
            elif operation == CONTRAST:
                image = ImageEnhance.Contrast(image).enhance(float(params.contrast[row]))
            elif operation == SATURATION:
                image = ImageEnhance.Color(image).enhance(float(params.saturation[row]))
            elif operation == HUE:
                image = _shift_hue(image, float(params.hue[row]))
    if params.gray[row]:
        image = image.convert("L").convert("RGB")
    if params.blur_sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(params.blur_sigma[row])))
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    shift = np.uint8(int(turns * 255) % 256)
    if shift == 0:
        return image  # the way to HSV and back alone costs up to nine grey levels
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + shift)  # wraps around, like the circle
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _check(threads: int, prefetch: int) -> None:
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}, expected both at least 1")


@dataclass(frozen=True, slots=True)
class _Task:
    """A batch to be loaded."""

    label: Any
    """Says which it is."""
    size: tuple[int, int]
    """Height and width of its images."""
    calls: list[tuple]
    """A function that returns `Decoded`, and its arguments, for each image."""
    masked: bool = True


class _Loading:
    """A batch that threads load, image by image, into memory that the device can copy from."""

    def __init__(
        self, task: _Task, pool: ThreadPoolExecutor, device: torch.device, stream: torch.cuda.Stream | None
    ):
        self.label, self._device, self._stream = task.label, device, stream
        shape, settings = (len(task.calls), *task.size), {"dtype": torch.uint8, "device": device}
        self._pixels_NHWC = staging(*shape, 3, **settings)
        self._labels_NHW = staging(*shape, **settings) if task.masked else None
        self._rows = [pool.submit(self._fill, row, *call) for row, call in enumerate(task.calls)]
        self._arriving: Arriving | None = None

    def _fill(self, row: int, load: Callable[..., Decoded], *args: Any) -> None:
        image, mask = load(*args)
        self._pixels_NHWC.numpy()[row] = image
        if self._labels_NHW is not None:
            self._labels_NHW.numpy()[row] = mask

    def is_good(self) -> bool:
        """Whether all of it is loaded, and nothing failed."""
        return all(row.done() and row.exception() is None for row in self._rows)

    def send(self) -> None:
        """Queues the copy to the device, once; waits for what is not loaded yet, and raises what failed."""
        if self._arriving is None:
            for row in self._rows:
                row.result()
            there = [staged for staged in (self._pixels_NHWC, self._labels_NHW) if staged is not None]
            with on(self._stream):
                copies = [staged.to(self._device, non_blocking=True) for staged in there]
                self._arriving = Arriving(*copies, stream=self._stream)

    def take(self) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Label, normalised images and labels, on the device."""
        self.send()
        pixels_NHWC, *labels = self._arriving.take()
        return self.label, normalised(pixels_NHWC).permute(0, 3, 1, 2), labels[0] if labels else None


def _pooled(
    tasks: Iterable[_Task], threads: int, prefetch: int, device: torch.device
) -> Iterator[tuple[Any, torch.Tensor, torch.Tensor | None]]:
    """Loads batches in a pool of threads; yields them in order, `prefetch` of them being worked on.

    PIL and NumPy release the interpreter's lock in most of what they do here, so threads are enough. A batch that is
    loaded when the one before it is asked for is copied then, beside what the device computes; one that is late or
    broken waits for its turn.
    """
    pool, stream = ThreadPoolExecutor(threads, thread_name_prefix="stpp-load"), copy_stream(device)
    ahead: deque[_Loading] = deque()

    def next_one() -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        taken = ahead.popleft().take()
        if ahead and ahead[0].is_good():
            ahead[0].send()
        return taken

    try:
        for task in tasks:
            ahead.append(_Loading(task, pool, device, stream))
            if len(ahead) > prefetch:
                yield next_one()
        while ahead:
            yield next_one()
    finally:
        pool.shutdown(cancel_futures=True)
