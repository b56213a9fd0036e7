"""Reference loader in PIL and NumPy: defines the result of the DALI graph, and replaces it if DALI is not
installed.

It has the functions and random numbers of `stpp.loading.dali`. Colours match torchvision's ColorJitter on PIL
images: ImageEnhance for brightness, contrast and saturation, a shift in 8-bit HSV for hue.

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
    """Decodes, augments and normalises micro-batches: see `stpp.loading.dali.train_batches`.

    A pool of `threads` threads decodes and augments; batches are normalised on the device.
    """
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads is {threads} and prefetch is {prefetch}, expected both at least 1")
    device, noise = torch.device(device), noise_image(noise_side(augment.crop_px))
    return _pooled(stream, micro_batches, partial(draw, stream, augment=augment, seed=seed, stage=stage),
                   partial(augmented, stream=stream, noise=noise), threads, prefetch, device)


def decoded(sample: Sample, *, masked: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """Decodes a sample's files: uint8 [H, W, 3] colours and, if `masked`, its uint8 [H, W] mask.

    Raises:
        UserError: a file is missing, broken, or of another size than the sample.
    """
    return image_of(sample), mask_of(sample) if masked else None


def augmented(
    image: np.ndarray, mask: np.ndarray | None, drawn: Augmentation, row: int, *, stream: Stream,
    noise: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Applies the augmentation of one sample.

    Args:
        image, mask: uint8 [H, W, 3] and uint8 [H, W].
        drawn, row: augmentation of the batch, and row of the sample.
        stream: stream of the sample, with its views.
        noise: uint8 noise image for the boxes.

    Returns:
        Views, uint8 [side, side, 3] each, not normalised; and the mask, uint8 [side, side].
    """
    crop, labels = _cropped(image, mask, drawn.geometry, row)
    views = []
    for view, kind in zip(drawn.views, stream.views, strict=True):
        view_HW3 = crop
        if kind != "weak" and (view.jitter[row] or view.gray[row] or view.blur_sigma[row] > 0):
            view_HW3 = np.array(_recolored(Image.fromarray(np.ascontiguousarray(crop)), view, row))
        y, x, box_h, box_w = view.box[row].tolist()
        if box_h and stream.box == "erase":
            view_HW3 = view_HW3.copy()
            noise_y, noise_x = view.noise_offset[row] + (y, x)
            view_HW3[y : y + box_h, x : x + box_w] = \
                noise[noise_y : noise_y + box_h, noise_x : noise_x + box_w]
            if labels is not None:
                labels[y : y + box_h, x : x + box_w] = IGNORE
        views.append(view_HW3)
    return views, labels


def _cropped(image: np.ndarray, mask: np.ndarray | None, cut: Geometry,
             row: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Resizes, pads, crops and flips."""
    size, side = (int(cut.resize_w[row]), int(cut.resize_h[row])), cut.crop_px
    top, left = int(cut.crop_y[row]), int(cut.crop_x[row])
    height, width = min(size[1] - top, side), min(size[0] - left, side)
    crop = np.zeros((side, side, 3), dtype=np.uint8)
    # Image.fromarray needs contiguous rows, and an image turned upright is a view.
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
    """Computes the source pixel under each pixel's centre, int64 [resized]; the later one on a border.

    It equals PIL's nearest except at borders, where PIL's choice depends on rounding errors.
    """
    return (2 * np.arange(resized) + 1) * source // (2 * resized)


def _recolored(image: Image.Image, view: Appearance, row: int) -> Image.Image:
    """Applies jitter, gray and blur."""
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
        return image  # the conversion to HSV and back alone changes up to nine grey levels
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + shift)  # uint8 wraps around, like the circle
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


class _Loading:
    """Batch that threads load, image by image, into staging memory for the copy to the device."""

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
        self._upload: AsyncUpload | None = None

    def _fill(self, row: int, sample: Sample) -> None:
        views, mask = self._apply(*decoded(sample, masked=self._stream.masked), self._drawn, row)
        for number, view in enumerate(views):
            self._pixels_VNHWC.numpy()[number, row] = view
        if self._labels_NHW is not None:
            self._labels_NHW.numpy()[row] = mask

    def is_good(self) -> bool:
        """Checks that all images are loaded without an error."""
        return all(row.done() and row.exception() is None for row in self._rows)

    def send(self) -> None:
        """Queues the copy to the device, once; waits for unfinished images, and raises their errors."""
        if self._upload is None:
            for row in self._rows:
                row.result()
            loaded = [staged for staged in (self._pixels_VNHWC, self._labels_NHW) if staged is not None]
            with on_stream(self._copies):
                copies = [staged.to(self._device, non_blocking=True) for staged in loaded]
                self._upload = AsyncUpload(*copies, stream=self._copies)

    def take(self) -> Batch:
        """Returns the batch, on the device."""
        self.send()
        pixels_VNHWC, *labels = self._upload.take()
        return Batch(views=tuple(normalised(view).permute(0, 3, 1, 2) for view in pixels_VNHWC),
                     labels_NHW=labels[0] if labels else None, indices=self._micro.indices,
                     step=self._micro.step, epoch=self._micro.epoch,
                     **pasting(self._drawn, self._stream, self._device))


def _pooled(stream: Stream, micro_batches: Iterable[MicroBatch], numbers: Callable, apply: Callable,
            threads: int, prefetch: int, device: torch.device) -> Iterator[Batch]:
    """Loads batches in a pool of threads, `prefetch` ahead, and yields them in order.

    PIL and NumPy release the GIL in most operations used here, so threads suffice. If the next batch is
    loaded when one is requested, its copy overlaps with the device's computation; a late or broken batch is
    copied in its turn.
    """
    pool, copies = ThreadPoolExecutor(threads, thread_name_prefix="stpp-load"), copy_stream(device)
    loading: deque[_Loading] = deque()

    def next_batch() -> Batch:
        taken = loading.popleft().take()
        if loading and loading[0].is_good():
            loading[0].send()
        return taken

    try:
        for micro in micro_batches:
            drawn = numbers(micro.indices, micro.positions, epoch=micro.epoch)
            loading.append(_Loading(micro, drawn, stream, apply, pool, device, copies))
            if len(loading) > prefetch:
                yield next_batch()
        while loading:
            yield next_batch()
    finally:
        pool.shutdown(cancel_futures=True)
