"""Colours of class masks."""

import colorsys

import numpy as np

VOID = (255, 255, 255)


def palette(num_classes: int) -> np.ndarray:
    """Colours of class ids: uint8 [256, 3]; class 0 is dark, neighbouring ids differ in hue, 255 (ignore) is white."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[255] = VOID
    for i in range(min(num_classes, 255)):
        # Multiples of the golden ratio spread hues evenly for any number of classes.
        hue, value = i * 0.618034 % 1, (0.25, 0.95, 0.7)[min(i, 1 + i % 2)]
        colours[i] = [round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.2 if i == 0 else 0.75, value)]
    return colours


def colourise(mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """uint8 [H, W] class ids to uint8 [H, W, 3]."""
    return palette(num_classes)[mask_HW]


def overlaid(colours_HWC: np.ndarray, mask_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """An image, uint8 [H, W, 3], with the colours of its mask over it, half of each."""
    return ((colours_HWC.astype(np.uint16) + colourise(mask_HW, num_classes)) // 2).astype(np.uint8)
