"""Augmentation parameters: all random numbers of a training sample, drawn outside the image pipeline.

The numbers depend on (seed, stage, epoch, position), the stream, the view and the sample, never on the rest
of the batch, the rank, or earlier draws. Both loaders use these numbers; neither draws any.

Legend: N samples of a batch. The crop is `crop_px` x `crop_px`, cut from the resized image padded right and
bottom.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from stpp.config import AugmentConfig
from stpp.device import staging
from stpp.loading.sample import Preference, Sample, Stream
from stpp.loading.sampler import STREAMS_OF_LIST, drawn_classes, philox, uniform_rows

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Values of `Appearance.jitter_order`."""


LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in PIL's gray image."""

_AUGMENT_STREAM = 1
_NOISE_STREAM = 2
_CROP_STREAM = 15
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)

# Each position has a block of uniform numbers: 16 scalars, then cutout attempts of four numbers. An attempt
# fits with probability 0.27: one box in 7000 needs more than 28 attempts, and draws further blocks.
_SCALARS = 16
_BLOCK = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Resize, pad, crop and flip of each sample, one row per sample; shared by all views."""

    resize_h: np.ndarray
    """int32 [N]: height after resizing, before padding."""
    resize_w: np.ndarray
    """int32 [N]: width after resizing, before padding."""
    crop_y: np.ndarray
    """int32 [N]: top row of the crop in the padded image."""
    crop_x: np.ndarray
    """int32 [N]: left column of the crop in the padded image."""
    flip: np.ndarray
    """bool [N]: mirror the crop left to right."""
    crop_px: int
    """Side of the crop, in pixels."""

    def __len__(self) -> int:
        return len(self.resize_h)

    @property
    def shown(self) -> np.ndarray:
        """Part of each crop without padding: int32 [N, 4], y, x, height, width."""
        height = np.minimum(self.resize_h - self.crop_y, self.crop_px)
        width = np.minimum(self.resize_w - self.crop_x, self.crop_px)
        left = np.where(self.flip, self.crop_px - width, 0)  # padding on the right is mirrored to the left
        return np.stack([np.zeros_like(left), left, height, width], axis=1).astype(np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Appearance:
    """Colour changes and box of one view, one row per sample, applied in the order jitter, gray, blur,
    cutout; identity for weak views."""

    jitter: np.ndarray
    """bool [N]: colours are jittered; if False, the factors are 1, 1, 1 and the hue shift is 0."""
    jitter_order: np.ndarray
    """int8 [N, 4]: the four operations in order of application."""
    brightness: np.ndarray
    """float32 [N]: factor."""
    contrast: np.ndarray
    """float32 [N]: factor."""
    saturation: np.ndarray
    """float32 [N]: factor."""
    hue: np.ndarray
    """float32 [N]: shift in turns of the colour circle."""
    gray: np.ndarray
    """bool [N]: replace the colours by their luma."""
    blur_sigma: np.ndarray
    """float32 [N]: standard deviation in pixels, 0 for no blur."""
    box: np.ndarray
    """int32 [N, 4]: y, x, height, width of the box in the crop; height 0 for no box."""
    noise_offset: np.ndarray
    """int32 [N, 2]: y, x in `noise_image` of the crop's top left pixel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Augmentation of a batch: one geometry, and an appearance for each view."""

    geometry: Geometry
    views: tuple[Appearance, ...]


def noise_side(crop_px: int) -> int:
    """Side of the noise image for crops of `crop_px`: offsets are uniform in 0..crop_px."""
    return 2 * crop_px


def noise_image(side: int) -> np.ndarray:
    """Makes the fixed noise that fills cutout boxes: uint8 [side, side, 3], uniform in 0..255."""
    count = side * side * 3
    bits = philox(_NOISE_STREAM, seed=0, stage=0, epoch=0).random_raw(-(-count // 8))
    return bits.astype("<u8").view(np.uint8)[:count].reshape(side, side, 3)


def draw(stream: Stream, indices: np.ndarray, positions: np.ndarray, *, augment: AugmentConfig, seed: int,
         stage: int, epoch: int) -> Augmentation:
    """Draws the augmentation of the samples at some positions of the epoch.

    Args:
        stream: stream of the samples, with its views and box.
        indices: int64 [N]: indices of the samples in the stream's list.
        positions: int64 [N], non-negative: positions of the samples in the epoch's order.
        augment: size of the crop, range of the long side, and strength of the strong views.
        seed, stage, epoch: the rest of the key.

    Raises:
        ValueError: lengths that differ.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if len(indices) != len(positions):
        raise ValueError(f"{len(indices)} samples but {len(positions)} positions")
    samples = [stream.samples[i] for i in indices]
    key = {"seed": seed, "stage": stage, "epoch": epoch, "number": stream.number}
    uniforms = _uniforms(positions, 0, view=0, **key)
    strong_by_view = {"sample": np.array([sample.strong for sample in samples], dtype=bool),
                      "weak": np.zeros(len(samples), dtype=bool), "strong": np.ones(len(samples), dtype=bool)}
    views = []
    for number, view in enumerate(stream.views):
        own = uniforms if number == 0 or view == "weak" else _uniforms(positions, 0, view=number, **key)
        boxes = partial(_boxes, positions=positions, augment=augment, one_area=stream.box == "paste",
                        further=partial(_uniforms, view=number, **key))
        views.append(_appearance(own, strong_by_view[view], augment, boxes))
    geometry = _geometry(uniforms, samples, augment)
    if stream.preference is not None:
        geometry = _recropped(geometry, uniforms, samples, indices, positions, augment, stream.preference,
                              **key)
    return Augmentation(geometry=geometry, views=tuple(views))


def pasting(drawn: Augmentation, stream: Stream, device: torch.device) -> dict[str, torch.Tensor]:
    """Makes the `Batch` fields for a step that pastes: boxes of the views and unpadded parts, on the device;
    none if boxes are erased."""
    if stream.box != "paste":
        return {}
    numbers = {"boxes_VN4": np.stack([view.box for view in drawn.views]), "shown_N4": drawn.geometry.shown}
    return {name: staging(*values.shape, dtype=torch.int32, device=device).copy_(torch.from_numpy(values))
            .to(device, non_blocking=True) for name, values in numbers.items()}


def _geometry(uniforms: np.ndarray, samples: Sequence[Sample], augment: AugmentConfig) -> Geometry:
    u_side, u_y, u_x, u_flip = uniforms[:, :4].T
    sizes = np.array([(sample.height, sample.width) for sample in samples], dtype=np.int64).reshape(-1, 2)
    low, high = augment.long_side
    if augment.long_side_unit == "percent":
        longest = sizes.max(axis=1, initial=1)
        low, high = (np.maximum(longest * share // 100, 1) for share in (low, high))
    resized = _resized(sizes, _integers(u_side, low, high + 1))
    spare = np.maximum(resized - augment.crop_px, 0)
    return Geometry(
        resize_h=resized[:, 0].astype(np.int32),
        resize_w=resized[:, 1].astype(np.int32),
        crop_y=_integers(u_y, 0, spare[:, 0] + 1),
        crop_x=_integers(u_x, 0, spare[:, 1] + 1),
        flip=u_flip < 0.5,
        crop_px=augment.crop_px,
    )


def _recropped(geometry: Geometry, uniforms: np.ndarray, samples: Sequence[Sample], indices: np.ndarray,
               positions: np.ndarray, augment: AugmentConfig, preference: Preference, *, seed: int,
               stage: int, epoch: int, number: int) -> Geometry:
    """Redraws size and position of crops that lack the class of their place, up to `crop_tries` crops; the
    last one is used. Flips are kept."""
    key = {"seed": seed, "stage": stage, "epoch": epoch}
    classes, _ = drawn_classes(preference, positions, number=number, **key)
    for attempt in range(1, preference.crop_tries):
        lacking = np.array([row for row in np.flatnonzero(classes >= 0) if not _shows(
            geometry, row, preference.spots[indices[row]].get(classes[row]))], dtype=np.int64)
        if not len(lacking):
            break
        again = uniforms[lacking].copy()
        again[:, :3] = uniform_rows(positions[lacking], 4, stream=_CROP_STREAM + STREAMS_OF_LIST * number,
                                    block=attempt, **key)[:, :3]
        fresh = _geometry(again, [samples[row] for row in lacking], augment)
        columns = {name: getattr(geometry, name).copy() for name in ("resize_h", "resize_w", "crop_y",
                                                                     "crop_x")}
        for name, values in columns.items():
            values[lacking] = getattr(fresh, name)
        geometry = replace(geometry, **columns)
    return geometry


def _shows(geometry: Geometry, row: int, spots: np.ndarray | None) -> bool:
    """Checks if one of these pixels lies in the crop of a row; True if no pixel is known."""
    if spots is None:
        return True
    inside = np.ones(len(spots), dtype=bool)
    for axis, (side, first) in enumerate(((geometry.resize_h[row], geometry.crop_y[row]),
                                          (geometry.resize_w[row], geometry.crop_x[row]))):
        at = np.floor(spots[:, axis].astype(np.float64) * side)
        inside &= (at >= first) & (at < first + geometry.crop_px)
    return bool(inside.any())


def _appearance(uniforms: np.ndarray, strong: np.ndarray, augment: AugmentConfig,
                boxes: Callable) -> Appearance:
    (u_jitter, u_order, u_bright, u_contrast, u_saturation, u_hue, u_gray, u_blur, u_sigma, u_box, u_noise_y,
     u_noise_x) = uniforms[:, 4:_SCALARS].T  # fmt: skip
    jitter = strong & (u_jitter < augment.jitter_p)
    blur = strong & (u_blur < augment.blur_p)
    low, high = augment.jitter
    sharpest, softest = augment.blur_sigma

    def factor(uniform: np.ndarray) -> np.ndarray:
        return np.where(jitter, low + (high - low) * uniform, 1.0).astype(np.float32)

    return Appearance(
        jitter=jitter,
        jitter_order=_ORDERS[_integers(u_order, 0, len(_ORDERS))],
        brightness=factor(u_bright),
        contrast=factor(u_contrast),
        saturation=factor(u_saturation),
        hue=np.where(jitter, 2 * augment.hue * u_hue - augment.hue, 0.0).astype(np.float32),
        gray=strong & (u_gray < augment.gray_p),
        blur_sigma=np.where(blur, sharpest + (softest - sharpest) * u_sigma, 0.0).astype(np.float32),
        box=boxes(uniforms[:, _SCALARS:], strong & (u_box < augment.box_p)),
        noise_offset=np.stack([_integers(u, 0, augment.crop_px + 1) for u in (u_noise_y, u_noise_x)], axis=1),
    )


def _uniforms(positions: np.ndarray, block: int, *, seed: int, stage: int, epoch: int, number: int,
              view: int) -> np.ndarray:
    """Draws float64 [N, _BLOCK] in [0, 1): each row depends only on its position, the stream, the view and
    the block's number."""
    stream = STREAMS_OF_LIST * number + (_AUGMENT_STREAM if view == 0 else _NOISE_STREAM + view)
    return uniform_rows(positions, _BLOCK, stream=stream, seed=seed, stage=stage, epoch=epoch, block=block)


def _integers(uniform: np.ndarray, low: int, high: int | np.ndarray) -> np.ndarray:
    """Converts uniform numbers to uniform integers low <= i < high, int32."""
    return (low + np.floor(uniform * (high - low))).astype(np.int32)


def _resized(sizes: np.ndarray, long_side: np.ndarray) -> np.ndarray:
    """Computes sizes, int64 [N, 2] (height, width): the long side as drawn, the other rounded half up, at
    least 1."""
    longest = sizes.max(axis=1, keepdims=True)
    return np.maximum((2 * sizes * long_side[:, None] + longest) // (2 * longest), 1)


def _boxes(attempts: np.ndarray, has_box: np.ndarray, *, positions: np.ndarray, augment: AugmentConfig,
           one_area: bool, further: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """Draws boxes: the first attempt that lies inside the crop.

    ST's cutout redraws area, shape and position in each attempt; UniMatch's CutMix keeps the area, which
    gives another distribution.

    Args:
        attempts: float64 [N, 4 k]: uniform numbers of the first k attempts.
        has_box: bool [N].
        positions: int64 [N].
        one_area: keep the area of the first attempt.
        further: function from positions and block number to further attempts, if none of the k fits.

    Returns:
        int32 [N, 4]: y, x, height, width; zeros for samples without a box.
    """
    boxes = np.zeros((len(positions), 4), dtype=np.int32)
    rows, crop_px = np.flatnonzero(has_box), augment.crop_px
    first_area = attempts[rows, :1]
    block = 0
    while len(rows):
        attempts = further(positions[rows], block) if block else attempts[rows]
        area, ratio, y, x = np.moveaxis(attempts.reshape(len(rows), -1, 4), 2, 0)
        if one_area:
            area = np.broadcast_to(first_area, area.shape)
        smallest, largest = augment.box_area
        flattest, steepest = augment.box_aspect
        area = (smallest + (largest - smallest) * area) * crop_px**2
        ratio = flattest + (steepest - flattest) * ratio
        candidates = np.stack(
            [np.floor(y * crop_px), np.floor(x * crop_px), np.sqrt(area * ratio), np.sqrt(area / ratio)],
            axis=2
        ).astype(np.int32)
        fits = (candidates[:, :, :2] + candidates[:, :, 2:] <= crop_px).all(axis=2)
        done = fits.any(axis=1)
        boxes[rows[done]] = candidates[done, fits.argmax(axis=1)[done]]
        rows, first_area = rows[~done], first_area[~done]
        block += 1
    return boxes
