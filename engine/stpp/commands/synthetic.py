"""A synthetic data set for demos and tests: images of five kinds of shapes, in the VOC layout.

Each class has its own shape, and a typical colour and texture. Lighting, shadow, noise and compression vary
between images, and one image in three is degraded: black and white, faded, dim, out of focus or tinted. A few
labelled images teach the task but not this range of appearances; the unlabelled ones show it.

All random numbers of an image come from a generator keyed by (seed, image number). H, W: pixels; colours are
float32 in 0..1.
"""

import colorsys
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from stpp import files
from stpp.errors import UserError
from stpp.images.masks import IGNORE
from stpp.images.palette import voc_colours
from stpp.loading.augment import LUMA

CLASSES = ("background", "disc", "box", "triangle", "star", "ring")
_LOOKS = {
    "disc": (0.05, "light", "plain"),
    "box": (0.55, "light", "stripes"),
    "triangle": (0.05, "dark", "plain"),
    "star": (0.55, "dark", "checks"),
    "ring": (0.30, "light", "dots"),
}
"""Typical hue in turns, brightness and texture of a class. The strong augmentation shifts hues by up to a
quarter turn but keeps brightness relative to the background, which separates classes of ambiguous hue."""
_TEXTURES = ("plain", "stripes", "checks", "speckle", "dots")
_FAULTS = ("gray", "faded", "dim", "blurred", "tinted")
_BACKGROUNDS = ("gradient", "clouds", "stripes", "blobs")
_SUPERSAMPLING = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """Difficulty of the task. Pairs are ranges of uniform draws."""

    side_px: tuple[int, int] = (48, 72)
    shapes: tuple[int, int] = (2, 5)
    """Shapes per image, inclusive range."""
    radius: tuple[float, float] = (0.24, 0.42)
    """Shape radius as a fraction of the image's shorter side; small shapes are more frequent."""
    stretch: float = 1.5
    """Maximum ratio of a shape's two axes."""
    hue_spread: float = 0.08
    """Standard deviation of a shape's hue around its class's hue, in turns."""
    any_colour: float = 0.0
    """Fraction of shapes with arbitrary hue and saturation."""
    typical_texture: float = 1.0
    """Fraction of shapes with their class's texture; the others have any texture."""
    texture_period_px: tuple[float, float] = (4.5, 8)
    texture_strength: tuple[float, float] = (0.35, 0.6)
    """Relative darkness of a texture's dark parts."""
    saturation: tuple[float, float] = (0.6, 0.95)
    light_value: tuple[float, float] = (0.75, 1.0)
    dark_value: tuple[float, float] = (0.2, 0.45)
    background_value: tuple[float, float] = (0.35, 0.75)
    background_saturation: tuple[float, float] = (0.0, 0.3)
    background_contrast: tuple[float, float] = (0.05, 0.3)
    """Difference in value between a background's colours."""
    distractors: tuple[int, int] = (0, 3)
    """Strokes in shape colours that belong to the background, inclusive range."""
    light: float = 0.3
    """Maximum brightness gradient across an image."""
    shadow: float = 0.35
    """Probability of a soft-edged shadow."""
    cast: float = 0.05
    """Standard deviation of the gain of each colour channel."""
    exposure: tuple[float, float] = (0.85, 1.15)
    blur_px: tuple[float, float] = (0.0, 0.6)
    poor: float = 0.35
    """Fraction of degraded images: black and white, faded, dim, out of focus or tinted."""
    noise: tuple[float, float] = (0.0, 0.03)
    """Standard deviation of the sensor noise."""
    jpeg_quality: tuple[int, int] = (45, 95)
    seldom: str | None = None
    """A rare class: one small shape in some images, none in the others; None: no rare class."""
    seldom_chance: float = 0.12
    """Probability that an image contains the rare class."""
    seldom_radius: tuple[float, float] = (0.07, 0.09)


def generate(
    out: str | os.PathLike, *, seed: int = 0, train: int = 400, val: int = 100,
    difficulty: Difficulty | None = None
) -> None:
    """Writes the data set: JPEGImages/, SegmentationClass/ (palette PNGs), ImageSets/Segmentation/,
    classes.json.

    Args:
        out: root of the data set.
        seed: other seeds give other images of the same distribution.
        train: number of images in train.txt; all have masks.
        val: number of images in val.txt.
        difficulty: None for the defaults.

    Raises:
        UserError: `out` already contains a data set.
    """
    if train < 1 or val < 0:
        raise ValueError(f"train, val: expected at least 1 and 0 images, got {train} and {val}")
    out = Path(out)
    if (out / "classes.json").exists() or (out / "JPEGImages").exists():
        raise UserError(f"{out}: already contains a data set; choose another folder or remove it")
    for folder in ("JPEGImages", "SegmentationClass"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    difficulty = difficulty or Difficulty()
    names, colours = [f"{number:06d}" for number in range(train + val)], voc_colours(np.arange(256))
    for number, name in enumerate(names):
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
        pixels, mask = draw_picture(rng, difficulty)
        quality = int(rng.integers(difficulty.jpeg_quality[0], difficulty.jpeg_quality[1] + 1))
        Image.fromarray(pixels).save(out / "JPEGImages" / f"{name}.jpg", quality=quality)
        paletted = Image.fromarray(mask)
        paletted.putpalette(colours.ravel().tolist())
        paletted.save(out / "SegmentationClass" / f"{name}.png")
    lists = out / "ImageSets" / "Segmentation"
    files.write_text(lists / "train.txt", "".join(name + "\n" for name in names[:train]))
    files.write_text(lists / "val.txt", "".join(name + "\n" for name in names[train:]))
    # Written last: it marks the folder as complete.
    files.write_json(out / "classes.json",
                     {"classes": list(CLASSES), "palette": colours[: len(CLASSES)].tolist(),
                      "ignore_index": IGNORE})


def draw_picture(rng: np.random.Generator, difficulty: Difficulty) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 [H, W, 3], and its mask, uint8 [H, W]."""
    d = difficulty
    width, height = (int(side) for side in rng.integers(d.side_px[0], d.side_px[1] + 1, size=2))
    canvas = _background(rng, height, width, d)
    mask = np.zeros((height, width), dtype=np.uint8)
    for _ in range(rng.integers(d.distractors[0], d.distractors[1] + 1)):
        coverage = _stroke(rng, height, width)
        colour = _colour(rng.random(), rng.uniform(*d.saturation),
                         rng.uniform(d.dark_value[0], d.light_value[1]))
        fill = _fill(rng, height, width, colour, str(rng.choice(_TEXTURES)), d)
        canvas += coverage[..., None] * (fill - canvas)
    labels = [i for i, name in enumerate(CLASSES) if i and name != d.seldom]
    for _ in range(rng.integers(d.shapes[0], d.shapes[1] + 1)):
        _draw_shape(rng, canvas, mask, labels[int(rng.integers(0, len(labels)))], d)
    if d.seldom is not None and rng.random() < d.seldom_chance:
        _draw_shape(rng, canvas, mask, CLASSES.index(d.seldom), replace(d, radius=d.seldom_radius))
    return _photograph(rng, canvas, d), mask


def _draw_shape(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, label: int,
                d: Difficulty) -> None:
    """Draws one shape of a class over the canvas."""
    coverage = _shape(rng, *mask.shape, label, d)
    canvas += coverage[..., None] * (_look(rng, *mask.shape, CLASSES[label], d) - canvas)
    mask[coverage >= 0.5] = label


def _smooth(rng: np.random.Generator, height: int, width: int, cells: float) -> np.ndarray:
    """Smooth noise in 0..1, float32 [H, W], with about `cells` hills along the longer side."""
    scale = cells / max(height, width)
    grid = rng.random((max(2, round(height * scale) + 1), max(2, round(width * scale) + 1)), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def _grid(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates rotated by a random angle: two float32 [H, W], in pixels."""
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.asarray(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _background(rng: np.random.Generator, height: int, width: int, d: Difficulty) -> np.ndarray:
    """A random textured background, float32 [H, W, 3]."""
    family = rng.choice(_BACKGROUNDS)
    u, _ = _grid(rng, height, width)
    if family == "gradient":
        field = (u - u.min()) / (u.max() - u.min())
    elif family == "clouds":
        octaves = [_smooth(rng, height, width, 3 * 2**octave) / 2**octave for octave in range(4)]
        field = sum(octaves) / 1.875
    elif family == "stripes":
        bend = 12 * _smooth(rng, height, width, 3)
        field = 0.5 + 0.5 * np.sin((u + bend) * 2 * np.pi / rng.uniform(6, 40))
    else:
        field = 1 / (1 + np.exp(-20 * (_smooth(rng, height, width, rng.uniform(4, 12)) - 0.5)))
    hue, value = rng.random(), rng.uniform(*d.background_value)
    contrast = rng.uniform(*d.background_contrast) * rng.choice((-1, 1))
    first = _colour(hue, rng.uniform(*d.background_saturation), value)
    second = _colour(
        hue + rng.normal(0, 0.15), rng.uniform(*d.background_saturation), np.clip(value + contrast, 0.05, 1)
    )
    grain = rng.uniform(0, 0.15) * (_smooth(rng, height, width, 40) - 0.5)
    return (
        first + (second - first) * field[..., None].astype(np.float32) + grain[..., None].astype(np.float32)
    )


def _look(rng: np.random.Generator, height: int, width: int, name: str, d: Difficulty) -> np.ndarray:
    """A fill typical of a class, with variation."""
    hue, brightness, texture = _LOOKS[name]
    hue += rng.normal(0, d.hue_spread)
    if rng.random() < d.any_colour:
        hue, brightness = rng.random(), str(rng.choice(("light", "dark")))
    if rng.random() >= d.typical_texture:
        texture = str(rng.choice(_TEXTURES))
    value = rng.uniform(*(d.light_value if brightness == "light" else d.dark_value))
    return _fill(rng, height, width, _colour(hue, rng.uniform(*d.saturation), value), texture, d)


def _fill(
    rng: np.random.Generator, height: int, width: int, colour: np.ndarray, texture: str, d: Difficulty
) -> np.ndarray:
    """A textured colour, float32 [H, W, 3]."""
    strength, period = rng.uniform(*d.texture_strength), rng.uniform(*d.texture_period_px)
    u, v = _grid(rng, height, width)
    waves = 2 * np.pi / period
    if texture == "stripes":
        field = np.sin(u * waves) > 0
    elif texture == "checks":
        field = np.sin(u * waves) * np.sin(v * waves) > 0
    elif texture == "dots":
        field = np.cos(u * waves) + np.cos(v * waves) > 0.9
    elif texture == "speckle":
        field = _smooth(rng, height, width, 2 * max(height, width) / period) > 0.6
    else:
        field = np.zeros((height, width), dtype=bool)
    return colour * np.where(field, np.float32(1 - strength), np.float32(1))[..., None]


def _shape(rng: np.random.Generator, height: int, width: int, label: int, d: Difficulty) -> np.ndarray:
    """Pixel coverage of a shape, float32 [H, W]."""
    low, high = d.radius
    radius = (low + (high - low) * rng.random() ** 1.5) * min(height, width)
    centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    axes = np.array([1.0, rng.uniform(1 / d.stretch, 1)])
    circle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    name = CLASSES[label]
    if name == "box":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.8
    elif name == "triangle":
        angles = np.array([0, 1, 2]) * 2 * np.pi / 3 + rng.normal(0, 0.12, 3)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 1.15
    elif name == "star":
        count = int(rng.integers(4, 7))
        angles = np.arange(2 * count) * np.pi / count
        lengths = np.where(np.arange(2 * count) % 2, rng.uniform(0.4, 0.5), 1.2)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None]
    else:
        points = np.stack([np.cos(circle), np.sin(circle)], axis=1)
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def placed(outline: np.ndarray) -> list[tuple[float, float]]:
        return [tuple(point) for point in ((outline * axes * radius) @ turn + centre) * _SUPERSAMPLING]

    large = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    pen = ImageDraw.Draw(large)
    pen.polygon(placed(points), fill=255)
    if name == "ring":
        pen.polygon(placed(points * rng.uniform(0.5, 0.65)), fill=0)
    return _coverage(large)


def _stroke(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Pixel coverage of a bent line across part of the image, float32 [H, W]."""
    start = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    steps = rng.normal(0, 0.18 * min(height, width), size=(int(rng.integers(2, 6)), 2))
    points = np.concatenate([start[None], start + np.cumsum(steps, axis=0)]) * _SUPERSAMPLING
    large = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    thickness = int(rng.integers(1, 5)) * _SUPERSAMPLING
    ImageDraw.Draw(large).line([tuple(point) for point in points], fill=255, width=thickness, joint="curve")
    return _coverage(large)


def _coverage(large: Image.Image) -> np.ndarray:
    return np.asarray(large.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def _photograph(rng: np.random.Generator, canvas: np.ndarray, d: Difficulty) -> np.ndarray:
    """Applies light, shadow, colour cast, blur and noise; returns uint8 [H, W, 3]."""
    height, width, _ = canvas.shape
    u, _ = _grid(rng, height, width)
    light = 1 - rng.uniform(0, d.light) * (u - u.min()) / (u.max() - u.min())
    if rng.random() < d.shadow:
        edge = (_smooth(rng, height, width, rng.uniform(1.5, 4)) - rng.uniform(0.4, 0.6)) * rng.uniform(8, 40)
        light = light * (1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-edge)))
    cast, exposure, blur_px = d.cast, rng.uniform(*d.exposure), rng.uniform(*d.blur_px)
    faults = rng.choice(_FAULTS, size=rng.integers(1, 3), replace=False) if rng.random() < d.poor else ()
    if "gray" in faults:
        canvas = np.repeat((canvas @ LUMA)[..., None], 3, axis=2)
    if "faded" in faults:
        canvas = rng.uniform(0.4, 0.7) + (canvas - 0.5) * rng.uniform(0.35, 0.6)
    if "dim" in faults:
        exposure = rng.uniform(0.4, 0.65)
    if "blurred" in faults:
        blur_px = rng.uniform(1.0, 1.7)
    if "tinted" in faults:
        cast = 0.35
    gain = np.exp(rng.normal(0, cast, size=3)) * exposure
    lit = (canvas * (light[..., None] * gain)).clip(0, 1)
    blurred = Image.fromarray((lit * 255 + 0.5).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur_px))
    grain = rng.standard_normal((height, width, 3), dtype=np.float32) * (255 * rng.uniform(*d.noise))
    return (np.asarray(blurred, dtype=np.float32) + grain + 0.5).clip(0, 255).astype(np.uint8)
