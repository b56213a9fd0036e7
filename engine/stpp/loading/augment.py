"""Every random number of a training sample, drawn outside the image pipeline and keyed by its position.

The numbers depend on (seed, stage, epoch, position) and on the sample, never on the batch around it, the rank, or what
was drawn before. Both loaders take the same numbers; neither draws any.

Legend: N samples of a batch. The crop is `crop_px` x `crop_px`, cut from the resized image padded right and bottom.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stpp.loading.sample import Sample
from stpp.loading.sampler import philox

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""Values of `AugmentParams.jitter_order`."""


LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in PIL's gray image."""

_AUGMENT_STREAM = 1
_NOISE_STREAM = 2
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)

# One block of uniform numbers belongs to a position: the first 16 are the scalars, then come cutout attempts of four.
# An attempt fits with probability 0.27: one box in 7000 needs more than 28, and draws further blocks.
_SCALARS = 16
_BLOCK = 128
_COUNTS_PER_BLOCK = _BLOCK // 4


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentParams:
    """What happens to each sample of a batch, in this order: resize, pad, crop, flip; jitter, gray, blur, cutout.

    Every field has one row a sample. A weakly augmented sample has identities from `jitter` on.
    """

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
    strong: np.ndarray
    """bool [N]: whether the sample is strongly augmented at all; False means identities below."""
    jitter: np.ndarray
    """bool [N]: whether colours are jittered. Where not, the factors are 1, 1, 1 and the hue shift is 0."""
    jitter_order: np.ndarray
    """int8 [N, 4]: the four operations in the order of their application."""
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
    cutout: np.ndarray
    """int32 [N, 4]: y, x, height, width of the box in the crop; height 0 for no box."""
    noise_offset: np.ndarray
    """int32 [N, 2]: y, x in `noise_image` of the pixel that lies under the crop's top left pixel."""

    def __len__(self) -> int:
        return len(self.resize_h)


def noise_side(crop_px: int) -> int:
    """Side of the noise image that serves crops of `crop_px`: offsets are uniform in 0..crop_px."""
    return 2 * crop_px


def noise_image(side: int) -> np.ndarray:
    """The fixed noise that fills cutout boxes: uint8 [side, side, 3], uniform in 0..255, always the same."""
    count = side * side * 3
    bits = philox(_NOISE_STREAM, seed=0, stage=0, epoch=0).random_raw(-(-count // 8))
    return bits.astype("<u8").view(np.uint8)[:count].reshape(side, side, 3)


def draw(
    samples: Sequence[Sample],
    positions: np.ndarray,
    *,
    seed: int,
    stage: int,
    epoch: int,
    crop_px: int,
    long_side: tuple[int, int],
) -> AugmentParams:
    """Draws the parameters of the samples at these positions of the epoch.

    Args:
        samples: N samples; `width`, `height` and `strong` are used.
        positions: int64 [N], non-negative: the samples' places in the epoch's order.
        seed, stage, epoch: the rest of the key.
        crop_px: side of the crop in pixels, at least 1.
        long_side: smallest and largest long side after resizing in pixels, both possible.

    Raises:
        ValueError: lengths that differ, an empty range, or a crop below 1.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if len(samples) != len(positions):
        raise ValueError(f"{len(samples)} samples but {len(positions)} positions")
    if crop_px < 1 or not 1 <= long_side[0] <= long_side[1]:
        raise ValueError(f"crop_px {crop_px}, long_side {long_side}: expected crop_px >= 1, 1 <= shortest <= longest")
    key = {"seed": seed, "stage": stage, "epoch": epoch}
    uniforms = _uniforms(positions, 0, **key)
    (u_side, u_y, u_x, u_flip, u_jitter, u_order, u_bright, u_contrast, u_saturation, u_hue,
     u_gray, u_blur, u_sigma, u_cutout, u_noise_y, u_noise_x) = uniforms[:, :_SCALARS].T  # fmt: skip

    sizes = np.array([(sample.height, sample.width) for sample in samples], dtype=np.int64).reshape(-1, 2)
    resized = _resized(sizes, _integers(u_side, long_side[0], long_side[1] + 1))
    spare = np.maximum(resized - crop_px, 0)
    strong = np.array([sample.strong for sample in samples], dtype=bool)
    jitter = strong & (u_jitter < 0.8)
    has_box = strong & (u_cutout < 0.5)
    return AugmentParams(
        resize_h=resized[:, 0].astype(np.int32),
        resize_w=resized[:, 1].astype(np.int32),
        crop_y=_integers(u_y, 0, spare[:, 0] + 1),
        crop_x=_integers(u_x, 0, spare[:, 1] + 1),
        flip=u_flip < 0.5,
        strong=strong,
        jitter=jitter,
        jitter_order=_ORDERS[_integers(u_order, 0, len(_ORDERS))],
        brightness=np.where(jitter, 0.5 + u_bright, 1.0).astype(np.float32),
        contrast=np.where(jitter, 0.5 + u_contrast, 1.0).astype(np.float32),
        saturation=np.where(jitter, 0.5 + u_saturation, 1.0).astype(np.float32),
        hue=np.where(jitter, 0.5 * u_hue - 0.25, 0.0).astype(np.float32),
        gray=strong & (u_gray < 0.2),
        blur_sigma=np.where(strong & (u_blur < 0.5), 0.1 + 1.9 * u_sigma, 0.0).astype(np.float32),
        cutout=_cutout(uniforms[:, _SCALARS:], has_box, positions, crop_px, key),
        noise_offset=np.stack([_integers(u_noise_y, 0, crop_px + 1), _integers(u_noise_x, 0, crop_px + 1)], axis=1),
    )


def _uniforms(positions: np.ndarray, block: int, *, seed: int, stage: int, epoch: int) -> np.ndarray:
    """float64 [N, _BLOCK] in [0, 1): each row a function of its position and the block's number alone."""
    out = np.empty((len(positions), _BLOCK), dtype=np.uint64)
    # A run of consecutive positions (what the sampler yields) is one run of the counter: one generator serves it.
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        if len(run):
            counter = (int(positions[run[0]]) * _COUNTS_PER_BLOCK, block)
            bits = philox(_AUGMENT_STREAM, seed=seed, stage=stage, epoch=epoch, counter=counter)
            out[run] = bits.random_raw(len(run) * _BLOCK).reshape(len(run), _BLOCK)
    return (out >> np.uint64(11)) * 2.0**-53


def _integers(uniform: np.ndarray, low: int, high: int | np.ndarray) -> np.ndarray:
    """int32: uniform integers low <= i < high from uniform numbers."""
    return (low + np.floor(uniform * (high - low))).astype(np.int32)


def _resized(sizes: np.ndarray, long_side: np.ndarray) -> np.ndarray:
    """int64 [N, 2] (height, width): the long side as drawn, the other rounded half up, never below 1."""
    longest = sizes.max(axis=1, keepdims=True)
    return np.maximum((2 * sizes * long_side[:, None] + longest) // (2 * longest), 1)


def _cutout(
    attempts: np.ndarray, has_box: np.ndarray, positions: np.ndarray, crop_px: int, key: dict[str, int]
) -> np.ndarray:
    """int32 [N, 4]: for each sample with a box, its first attempt that lies inside the crop; zeros for the others.

    Args:
        attempts: float64 [N, 4 k]: uniform numbers of the first k attempts.
        has_box: bool [N].
        positions, key: where further attempts come from, should none of the k fit.
    """
    boxes = np.zeros((len(positions), 4), dtype=np.int32)
    rows = np.flatnonzero(has_box)
    block = 0
    while len(rows):
        if block:
            attempts = _uniforms(positions[rows], block, **key)
        else:
            attempts = attempts[rows]
        area, ratio, y, x = np.moveaxis(attempts.reshape(len(rows), -1, 4), 2, 0)
        area = (0.02 + 0.38 * area) * crop_px**2
        ratio = 0.3 + (1 / 0.3 - 0.3) * ratio
        candidates = np.stack(
            [np.floor(y * crop_px), np.floor(x * crop_px), np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=2
        ).astype(np.int32)
        fits = (candidates[:, :, :2] + candidates[:, :, 2:] <= crop_px).all(axis=2)
        found = fits.any(axis=1)
        boxes[rows[found]] = candidates[found, fits.argmax(axis=1)[found]]
        rows = rows[~found]
        block += 1
    return boxes
