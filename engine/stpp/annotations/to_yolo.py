"""Export to YOLO polygons: one text per image, and `data.yaml` with the class names."""

import json
from pathlib import Path

import numpy as np

from stpp.annotations import trees
from stpp.annotations.labelled import LabelledImage, Scheme, objects
from stpp.annotations.to_coco import outline


def encode(image: LabelledImage, mask_HW: np.ndarray, scheme: Scheme) -> str:
    """Text of a mask, uint8 [H, W]."""
    lines = []
    for component in objects(mask_HW, scheme):
        shares = (outline(component) / mask_HW.shape[::-1]).ravel().tolist()
        words = (f"{share:.7f}".rstrip("0").rstrip(".") for share in shares)
        lines.append(f"{scheme.foreground.index(component.class_id)} {' '.join(words)}\n")
    return "".join(lines)


class YoloWriter:
    """Writes a folder or a zip archive."""

    def __init__(self, out: Path, scheme: Scheme):
        self._scheme, self._opened = scheme, trees.opened(out)

    def __enter__(self) -> "YoloWriter":
        self._tree = self._opened.__enter__()
        return self

    def add(self, image: LabelledImage, text: str) -> None:
        """Adds an image."""
        self._tree.add(f"labels/{image.key}.txt", text.encode())

    def __exit__(self, *raised: object) -> bool | None:
        if raised[0] is None:
            # JSON strings are valid YAML.
            names = {number: self._scheme.names[i] for number, i in enumerate(self._scheme.foreground)}
            lines = [f"  {number}: "
                     f"{json.dumps(name, ensure_ascii=False)}\n" for number, name in names.items()]
            text = f"path: .\ntrain: images\nval: images\nnames:\n{''.join(lines)}"
            self._tree.add("data.yaml", text.encode())
        return self._opened.__exit__(*raised)
