"""Labels on the disk in the form of `stpp label`, made without a network, and masks drawn by hypothesis."""

import json
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from stpp.label import rows
from stpp.label.sinks import encode

NAMES = ("background", "leaf", "stem")
SHARD = 4


def labels(
    out: Path, masks: Mapping[str, np.ndarray], *, tar: bool = False, classes=NAMES, ending: str = "jpg"
) -> Path:
    """Writes a labelling of masks by their keys; one of the images could not be read."""
    keys = list(masks)
    for shard in range(-(-len(keys) // SHARD)):
        members = keys[shard * SHARD : (shard + 1) * SHARD]
        table = [_row(key, masks[key], ending) for key in members]
        if shard == 0:
            table.append({"key": "bad", "source": "bad.jpg", "status": "bad", "error": "no image"})
        part = rows.part(out, "labels", shard)
        part.parent.mkdir(parents=True, exist_ok=True)
        rows.write(part, table, rows.LABELS)
        if tar:
            (out / "masks").mkdir(exist_ok=True)
            with tarfile.open(out / "masks" / f"shard-{shard:06d}.tar", "w") as archive:
                for key in members:
                    data = encode(masks[key])
                    member = tarfile.TarInfo(f"{key}.png")
                    member.size = len(data)
                    archive.addfile(member, BytesIO(data))
        else:
            for key in members:
                path = out / "masks" / f"{key}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(masks[key]))
    (out / "run.json").write_text(
        json.dumps({"format": "stpp-label-1", "fingerprint": {}, "classes": list(classes)})
    )
    (out / "summary.json").write_text("{}")
    return out


def _row(key: str, mask: np.ndarray, ending: str) -> dict:
    height, width = mask.shape
    counts = np.bincount(mask.ravel(), minlength=256)
    return {
        "key": key,
        "source": f"{key}.{ending}",
        "status": "ok",
        "width": width,
        "height": height,
        "mean_confidence": 0.875,
        "ignored_fraction": counts[255] / mask.size,
        "class_pixels": counts[:3].tolist(),
    }


@st.composite
def masks(draw, ids=(0, 1, 2, 255), most: int = 26):
    """Draws a mask of noise or of blocks, uint8 [H, W]."""
    height, width = draw(st.integers(1, most)), draw(st.integers(1, most))
    grain = draw(st.sampled_from([1, 3, 7]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = rng.choice(np.array(ids, np.uint8), (height // grain + 1, width // grain + 1))
    return np.kron(noise, np.ones((grain, grain), np.uint8))[:height, :width]


def data_set(root: Path, masks: Mapping[str, np.ndarray], folder: str = "") -> Path:
    """Writes images of the masks' sizes."""
    for number, (key, mask) in enumerate(masks.items()):
        path = root / folder / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return root
