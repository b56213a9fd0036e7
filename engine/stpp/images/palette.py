"""Colour palette of class masks, distinguishable with any colour vision.

Source: the eight colours of Okabe and Ito, Color Universal Design (2008), with lighter and darker variants
for classes beyond the eighth.
"""

import colorsys

import numpy as np

VOID = (255, 255, 255)
BASE = ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
        (204, 121, 167))
TINTS = ((0.0, (0, 0, 0)), (0.55, (255, 255, 255)), (0.5, (0, 0, 0)))
"""(share, colour) mixed into the base colours, for each group of eight classes."""
CONFIDENCE = ((0, (0, 32, 77)), (128, (124, 123, 120)), (255, (255, 234, 70)))
"""(value, colour) nodes of a linear scale. After cividis, Nuñez, Anderton and Renslow, PLOS ONE (2018)."""
STRIPE_PX = 3
"""Stripe width of ignored pixels and of classes beyond the eighth."""


def palette(num_classes: int) -> np.ndarray:
    """Colours of class ids: uint8 [256, 3]; 255 (ignore) is white."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[255] = VOID
    for i in range(min(num_classes, 255)):
        colours[i] = _colour(i)
    return colours


def voc_colours(numbers: np.ndarray) -> np.ndarray:
    """VOC's colours of numbers from 0 to 255, uint8 [N, 3]: bits, lowest first, become the highest bits of
    red, green and blue in turn."""
    colours = np.zeros((len(numbers), 3), dtype=np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = (numbers >> (3 * place + channel)) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours


def colourise(mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """uint8 [H, W] class ids to uint8 [H, W, 3]."""
    return palette(num_classes)[mask_HW]


def overlaid(colours_HWC: np.ndarray, mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Blends an image, uint8 [H, W, 3], with the colours of its mask, half of each."""
    return ((colours_HWC.astype(np.uint16) + colourise(mask_HW, num_classes)) // 2).astype(np.uint8)


def overlay(mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Class overlay for an image: uint8 [H, W, 4], transparent where ignored.

    Classes beyond the eighth also have a pattern: diagonal stripes in one direction for the next eight, in
    the other direction after that.
    """
    rgba = np.dstack([colourise(mask_HW, num_classes), np.where(mask_HW == 255, 0, 255).astype(np.uint8)])
    rows, columns = np.indices(mask_HW.shape)
    group = mask_HW // len(BASE)
    for number, slope in ((1, rows + columns), (2, rows - columns)):
        rgba[(group == number) & (slope // STRIPE_PX % 3 == 0), 3] = 90
    return rgba


def ignored_overlay(mask_HW: np.ndarray) -> np.ndarray:
    """Overlay of ignored pixels for an image: uint8 [H, W, 4], black and white stripes, transparent
    elsewhere."""
    rows, columns = np.indices(mask_HW.shape)
    light = ((rows + columns) // STRIPE_PX % 2).astype(np.uint8) * 255
    return np.dstack([light, light, light, np.where(mask_HW == 255, 230, 0).astype(np.uint8)])


def confidence_colours(confidence_HW: np.ndarray) -> np.ndarray:
    """Colours of a confidence map, uint8 [H, W] to uint8 [H, W, 3]: dark blue (0) through grey to yellow
    (255), with uniformly increasing lightness."""
    at, colours = zip(*CONFIDENCE, strict=True)
    channels = [np.interp(np.arange(256), at, channel).round().astype(np.uint8)
                for channel in zip(*colours, strict=True)]
    return np.stack(channels, axis=-1)[confidence_HW]


def _colour(i: int) -> tuple[int, int, int]:
    """Colour of class `i`; beyond the mixed colours, hues spaced by the golden ratio."""
    if i >= len(BASE) * len(TINTS):
        return tuple(round(255 * part)
                     for part in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, (0.95, 0.7)[i % 2]))
    share, other = TINTS[i // len(BASE)]
    base = (60, 60, 60) if i == 0 else BASE[i % len(BASE)]
    return tuple(round((1 - share) * a + share * b) for a, b in zip(base, other, strict=True))
