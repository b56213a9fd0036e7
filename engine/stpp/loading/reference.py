"""The loader in PIL and NumPy: what the DALI graphs must compute, and the loader where DALI is not installed.

The same functions, fed by the same numbers, as `stpp.loading.dali`. Colours are what torchvision's
ColorJitter makes of PIL images: ImageEnhance for brightness, contrast and saturation, a shift in 8-bit HSV
for hue.

Legend: N samples, H W pixels, C colours.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from stpp.config import AugmentConfig
from stpp.device import AsyncUpload, copy_stream, on_stream, staging
from stpp.images.masks import IGNORE
from stpp.images.pixels import normalised
from stpp.loading.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Appearance,
    Augmentation,
    Geometry,
    draw,
    noise_image,
    noise_side,
    pasting,
)
from stpp.loading.decode import image_of, mask_of
from stpp.loading.sample import Batch, Sample, Stream
from stpp.loading.sampler import MicroBatch


def train_batches(
    stream: Stream,
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
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}, expected both at least 1")
    device, noise = torch.device(device), noise_image(noise_side(augment.crop_px))
    return _pooled(stream, micro_batches, partial(draw, stream, augment=augment, seed=seed, stage=stage),
                   partial(augmented, stream=stream, noise=noise), threads, prefetch, device)


def decoded(sample: Sample, *, masked: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a sample's files: uint8 [H, W, 3] colours and, if `masked`, its uint8 [H, W] mask.

    Raises:
        UserError: a file that is missing, broken, or of another size than the sample says.
    """
    return image_of(sample), mask_of(sample) if masked else None


def augmented(
    image: np.ndarray, mask: np.ndarray | None, drawn: Augmentation, row: int, *, stream: Stream,
    noise: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Applies one row of the drawn numbers.

    Args:
        image, mask: uint8 [H, W, 3] and uint8 [H, W].
        drawn, row: which row of which numbers.
        stream: whose views are made.
        noise: uint8 image that boxes are filled from.

    Returns:
        uint8 [side, side, 3] each view, not normalised, and uint8 [side, side] mask.
    """
    crop, labels = _cropped(image, mask, drawn.geometry, row)
    views = []
    for view, kind in zip(drawn.views, stream.views, strict=True):
        seen = crop
        if kind != "weak" and (view.jitter[row] or view.gray[row] or view.blur_sigma[row] > 0):
            seen = np.array(_recolored(Image.fromarray(np.ascontiguousarray(crop)), view, row))
        y, x, box_h, box_w = view.box[row].tolist()
        if box_h and stream.box == "erase":
            seen = seen.copy()
            noise_y, noise_x = view.noise_offset[row] + (y, x)
            seen[y : y + box_h, x : x + box_w] = noise[noise_y : noise_y + box_h, noise_x : noise_x + box_w]
            if labels is not None:
                labels[y : y + box_h, x : x + box_w] = IGNORE
        views.append(seen)
    return views, labels


def _cropped(image: np.ndarray, mask: np.ndarray | None, cut: Geometry,
             row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Resizes, pads, crops and flips."""
    size, side = (int(cut.resize_w[row]), int(cut.resize_h[row])), cut.crop_px
    top, left = int(cut.crop_y[row]), int(cut.crop_x[row])
    height, width = min(size[1] - top, side), min(size[0] - left, side)
    crop = np.zeros((side, side, 3), dtype=np.uint8)
    # Image.fromarray wants rows in one piece, and an image turned upright is a view.
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BILINEAR))
    crop[:height, :width] = resized[top : top + height, left : left + width]
    labels = None
    if mask is not None:
        labels = np.full((side, side), IGNORE, dtype=np.uint8)
        source_rows = _nearest(size[1], mask.shape[0])[top : top + height]
        labels[:height, :width] = mask[source_rows[:, None],
                                       _nearest(size[0], mask.shape[1])[left : left + width]]
    if cut.flip[row]:
        crop, labels = crop[:, ::-1], None if labels is None else labels[:, ::-1]
    return crop, labels


def _nearest(resized: int, source: int) -> np.ndarray:
    """int64 [resized]: the source pixel under each pixel's centre; the later one where it falls on a border.

    PIL's nearest, but for the borders, where PIL follows its rounding errors.
    """
    return (2 * np.arange(resized) + 1) * source // (2 * resized)


def _recolored(image: Image.Image, view: Appearance, row: int) -> Image.Image:
    """Jitter, gray, blur."""
    if view.jitter[row]:
        for operation in view.jitter_order[row]:
            if operation == BRIGHTNESS:
                image = ImageEnhance.Brightness(image).enhance(float(view.brightness[row]))
            elif operation == CONTRAST:
                image = ImageEnhance.Contrast(image).enhance(float(view.contrast[row]))
            elif operation == SATURATION:
                image = ImageEnhance.Color(image).enhance(float(view.saturation[row]))
            elif operation == HUE:
                image = _shift_hue(image, float(view.hue[row]))
    if view.gray[row]:
        image = image.convert("L").convert("RGB")
    if view.blur_sigma[row] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(view.blur_sigma[row])))
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    shift = np.uint8(int(turns * 255) % 256)
    if shift == 0:
        return image  # the way to HSV and back alone costs up to nine grey levels
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + shift)  # wraps around, like the circle
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class _Loading:
    """A batch that threads load, image by image, into memory that the device can copy from."""

    def __init__(self, micro: MicroBatch, drawn: Augmentation, stream: Stream, apply: Callable,
                 pool: ThreadPoolExecutor, device: torch.device, copies: torch.cuda.Stream | None):
        self._micro, self._drawn, self._stream, self._apply = micro, drawn, stream, apply
        self._device, self._copies = device, copies
        n, side, settings = (
            len(micro.indices),
            drawn.geometry.crop_px,
            {"dtype": torch.uint8, "device": device},
        )
        self._pixels_VNHWC = staging(len(stream.views), n, side, side, 3, **settings)
        self._labels_NHW = staging(n, side, side, **settings) if stream.masked else None
        self._rows = [pool.submit(self._fill, row, stream.samples[i]) for row, i in enumerate(micro.indices)]
        self._arriving: AsyncUpload | None = None

    def _fill(self, row: int, sample: Sample) -> None:
        views, mask = self._apply(*decoded(sample, masked=self._stream.masked), self._drawn, row)
        for number, view in enumerate(views):
            self._pixels_VNHWC.numpy()[number, row] = view
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
            there = [staged for staged in (self._pixels_VNHWC, self._labels_NHW) if staged is not None]
            with on_stream(self._copies):
                copies = [staged.to(self._device, non_blocking=True) for staged in there]
                self._arriving = AsyncUpload(*copies, stream=self._copies)

    def take(self) -> Batch:
        """The batch, on the device."""
        self.send()
        pixels_VNHWC, *labels = self._arriving.take()
        return Batch(views=tuple(normalised(view).permute(0, 3, 1, 2) for view in pixels_VNHWC),
                     labels_NHW=labels[0] if labels else None, indices=self._micro.indices,
                     step=self._micro.step, epoch=self._micro.epoch,
                     **pasting(self._drawn, self._stream, self._device))


def _pooled(stream: Stream, micro_batches: Iterable[MicroBatch], numbers: Callable, apply: Callable,
            threads: int, prefetch: int, device: torch.device) -> Iterator[Batch]:
    """Loads batches in a pool of threads; yields them in order, `prefetch` of them being worked on.

    PIL and NumPy release the interpreter's lock in most of what they do here, so threads are enough. A batch
    that is loaded when the one before it is asked for is copied then, beside what the device computes; one
    that is late or broken waits for its turn.
    """
    pool, copies = ThreadPoolExecutor(threads, thread_name_prefix="stpp-load"), copy_stream(device)
    ahead: deque[_Loading] = deque()

    def next_one() -> Batch:
        taken = ahead.popleft().take()
        if ahead and ahead[0].is_good():
            ahead[0].send()
        return taken

    try:
        for micro in micro_batches:
            drawn = numbers(micro.indices, micro.positions, epoch=micro.epoch)
            ahead.append(_Loading(micro, drawn, stream, apply, pool, device, copies))
            if len(ahead) > prefetch:
                yield next_one()
        while ahead:
            yield next_one()
    finally:
        pool.shutdown(cancel_futures=True)
