"""Small data set of photographs and masks, to be damaged in many ways."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from stpp.dataset import index

GLOBS = {"images": "photos/**/*", "masks": "labels/**/*.png"}
SIZE = (32, 24)


def photo(path: Path, number: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """Writes a picture whose pixels depend on its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def ids(*blocks: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns a mask of 0 with a solid block of each id."""
    mask = np.zeros(size[::-1], np.uint8)
    for i, block in enumerate(blocks):
        mask[4:14, 2 + 9 * i : 10 + 9 * i] = block
    return mask


def paletted(values: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(values).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette([part for colour in colours for part in colour])
    return image


def data_set(root: Path, masks: Mapping[str, object], classes=("background", "leaf", "stem")) -> Path:
    """Writes photographs `photos/<name>.jpg` with masks `labels/<name>.png`: arrays, images, bytes of a PNG,
    or None."""
    for number, (name, mask) in enumerate(masks.items()):
        photo(root / "photos" / f"{name}.jpg", number)
        path = root / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(mask, bytes):
            path.write_bytes(mask)
        elif mask is not None:
            (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(path)
    (root / "classes.json").write_text(json.dumps(list(classes)))
    return root


def prepare(root: Path, **options) -> index.Index:
    return index.prepare(root, root.parent / "index", progress=False, **{**GLOBS, **options})
