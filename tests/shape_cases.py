"""Shapes for tests: outlines drawn by hypothesis, an exact rasteriser, and data sets in the tools'
formats."""

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from dataset_cases import photo
from stpp.dataset import index

SIZE = (32, 24)
SQUARE = (2, 3, 12, 3, 12, 13, 2, 13)
"""Pixels of columns 2 to 11 and rows 3 to 12."""


@st.composite
def outlines(draw, width: float, height: float) -> np.ndarray:
    """Draws float64 [N, 2]: an outline that does not cross itself, inside an image of this size."""
    count = draw(st.integers(3, 16))
    centre = np.array(
        [draw(st.floats(width * 0.2, width * 0.8)), draw(st.floats(height * 0.2, height * 0.8))]
    )
    room = min(*centre, width - centre[0], height - centre[1])
    # Corners at rising angles, less than half a turn apart: seen from the centre none hides another.
    turns = (np.arange(count) + [draw(st.floats(0, 0.45)) for _ in range(count)]) * 2 * np.pi / count
    radii = np.array([draw(st.floats(0.05, 1.0)) for _ in range(count)]) * room
    return centre + radii[:, None] * np.column_stack((np.cos(turns), np.sin(turns)))


def exact(ring: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (pixels whose centre an outline [N, 2] encloses an odd number of times, distance of every
    centre from the outline), each [H, W]."""
    y, x = (part + 0.5 for part in np.indices((height, width)))
    inside, distance = np.zeros((height, width), bool), np.full((height, width), np.inf)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 <= y) != (y1 <= y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / (length or 1), 0, 1)
        distance = np.minimum(distance, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return inside, distance


def square(value: int, unlisted: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Returns the mask of `SQUARE`."""
    mask = np.full(size[::-1], unlisted, np.uint8)
    mask[3:13, 2:12] = value
    return mask


def coco(images: dict[str, list[dict]], categories: dict[int, str], **more) -> dict:
    """Builds a COCO object of images by name with their annotations, which are completed."""
    listed, annotations = [], []
    for number, (name, members) in enumerate(images.items(), 1):
        listed.append({"id": number, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for one in members:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": [list(SQUARE)],
                }
                | one
            )
    return {
        "info": {"year": 2026},
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    } | more


def coco_set(root: Path, value: object, *, images: int = 3, name: str = "annotations.json") -> Path:
    """Writes photographs `photos/<number>.jpg` and a JSON file."""
    for number in range(images):
        photo(root / "photos" / f"{number}.jpg", number)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return root


def prepare(root: Path, **options) -> index.Index:
    return index.prepare(root, root.parent / "index", progress=False, workers=1, **options)


def drawn(made: index.Index, image: str) -> np.ndarray:
    """Reads the mask that a prepared index has for an image."""
    with Image.open(made.sample(image).mask) as file:
        assert file.mode == "L"
        return np.asarray(file)
