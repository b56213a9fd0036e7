"""Reads exports with the tools' own readers:
`build/readers/bin/python tool_readers.py datumaro|label-studio SOURCE OUT`.

Runs in a separate environment (`make readers`), whose packages need other versions than stpp. OUT.npz holds
`keys` and a mask `m0`, `m1`, ... for each of them.
"""

import json
import sys

import numpy as np


def datumaro(source: str, kind: str) -> dict[str, np.ndarray]:
    """Reads masks by image, of label numbers plus 1, 0 for no label; and the labels' names."""
    from datumaro.components.annotation import AnnotationType
    from datumaro.components.dataset import Dataset

    found = Dataset.import_from(source, kind)
    masks = {"names": np.array([one.name for one in found.categories()[AnnotationType.label].items])}
    for item in found:
        masks[item.id] = np.zeros(1, np.int16)
        for one in item.annotations:
            if one.type == AnnotationType.mask:
                pixels = np.asarray(one.image) > 0
            elif one.type == AnnotationType.polygon:
                pixels = filled(one.points, *item.media.size)
            else:
                continue
            if masks[item.id].size == 1:
                masks[item.id] = np.zeros(pixels.shape, np.int16)
            masks[item.id][pixels] = one.label + 1
    return masks


def filled(points: list[float], height: int, width: int) -> np.ndarray:
    from pycocotools import mask

    return mask.decode(mask.frPyObjects([list(points)], height, width))[..., 0] > 0


def label_studio(source: str) -> dict[str, np.ndarray]:
    """Reads brushes, 0 or 255, by image and label."""
    from label_studio_converter.brush import decode_rle

    masks = {}
    with open(source, encoding="utf-8") as file:
        tasks = json.load(file)
    for task in tasks:
        for one in task["predictions"][0]["result"]:
            size = one["original_height"], one["original_width"], 4
            name = f"{task['data']['image']}::{one['value']['brushlabels'][0]}"
            masks[name] = decode_rle(one["value"]["rle"]).reshape(size)[..., 3]
    return masks


if __name__ == "__main__":
    reader, source, *more, out = sys.argv[1:]
    read = datumaro(source, *more) if reader == "datumaro" else label_studio(source)
    np.savez(out, keys=np.array(list(read)), **{f"m{i}": mask for i, mask in enumerate(read.values())})
