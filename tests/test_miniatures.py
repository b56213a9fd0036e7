"""ST++ from files to results on a miniature of every layout: 4 labels, 4 unlabelled images, 2 for
validation."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stpp import cli
from stpp.images.masks import read_index_mask

SMALL = ("--device cpu --method stpp --data.fraction 4 --data.threads 1 --data.loader reference "
         "--model.backbone resnet18 --model.output-stride 32 --augment.crop-px 33 --augment.long-side 32 64 "
         "--train.epochs 1 --train.supervised-epochs 2 --train.batch-global 4 --train.lr 0.01 "
         "--train.precision fp32 --label.tta none --label.backend eager").split()
CLASSES = ["ground", "box"]


def scenes() -> Iterator[tuple[str, str, Image.Image, np.ndarray]]:
    """Yields (part, name, image, mask): noise with a bright box; eight images for training, of two sizes, and
    two for validation."""
    rng = np.random.default_rng(0)
    for i in range(10):
        width, height = (48, 40) if i % 2 else (40, 56)
        mask = np.zeros((height, width), dtype=np.uint8)
        top, left = rng.integers(2, 20, 2)
        mask[top : top + 16, left : left + 12] = 1
        pixels = rng.integers(0, 120, (height, width, 3), dtype=np.uint8) + mask[..., None] * 100
        mask[:2] = 255
        yield ("val" if i >= 8 else "train"), f"scene_{i:06d}_000019", Image.fromarray(pixels), mask


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def voc(root: Path) -> list[str]:
    """As published: palette masks, lists of bare names."""
    lists: dict[str, list[str]] = {"train": [], "val": []}
    for part, name, image, mask in scenes():
        save(image, root / "JPEGImages" / f"{name}.jpg")
        paletted = Image.fromarray(mask, "L").convert("P")
        paletted.putdata(mask.ravel().tolist())
        paletted.putpalette(bytes(range(256)) * 3)
        save(paletted, root / "SegmentationClass" / f"{name}.png")
        lists[part].append(name + "\n")
    for part, names in lists.items():
        path = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(names))
    return []


def cityscapes(root: Path) -> list[str]:
    """As published: masks of original ids."""
    ids = np.full(256, 4, dtype=np.uint8)  # "static", which is ignored
    ids[[0, 1]] = 7, 26  # road, car
    for part, name, image, mask in scenes():
        save(image, root / "leftImg8bit" / part / "town" / f"{name}_leftImg8bit.png")
        save(Image.fromarray(ids[mask]), root / "gtFine" / part / "town" / f"{name}_gtFine_labelIds.png")
    return []


def camvid(root: Path) -> list[str]:
    for part, name, image, mask in scenes():
        save(image, root / "images" / part / f"{name}.png")
        save(Image.fromarray(mask), root / "masks" / part / f"{name}.png")
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return []


def globs(root: Path) -> list[str]:
    """Colours, endings, and no validation list."""
    colours = np.full((256, 3), 255, dtype=np.uint8)
    colours[:2] = (0, 0, 0), (200, 0, 0)
    for i, (_, name, image, mask) in enumerate(scenes()):
        save(image, root / "shots" / f"day {i % 2}" / f"{name}.JPG")
        if i % 5:  # the others have no mask
            save(Image.fromarray(colours[mask]), root / "truth" / f"day {i % 2}" / f"{name}_mask.png")
    return ["--data.layout", "globs", "--data.images", "shots/**/*.jpg", "--data.masks",
            "truth/**/*_mask.png",
            "--data.val", "0.25", "--data.classes", *CLASSES, "--data.mask-map", "#000000=ground",
            "200,0,0=box", "#ffffff=ignore"]


@pytest.mark.parametrize(("build", "classes"), [(voc, 21), (cityscapes, 19), (camvid, 2), (globs, 2)],
                         ids=["voc", "cityscapes", "camvid", "globs"])
def test_stpp_runs_on_a_miniature_of_each_layout(tmp_path, build, classes):
    flags = build(tmp_path / "data")
    out, threads = tmp_path / "run", torch.get_num_threads()
    try:
        cli.main(["train", "--data.root", str(tmp_path / "data"), *flags, *SMALL, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    lists = {path.stem: path.read_text().splitlines() for path in (out / "split").iterdir()}
    assert {name: len(lines) for name, lines in lists.items()} == {"labeled": 4, "unlabeled": 4, "val": 2}
    results = json.loads((out / "results.json").read_text())
    trained = [stage for stage in results["stages"] if stage["steps"]]
    # Twice 4 labels give 2 steps an epoch; 4 labels and 2 pseudo labels 1; 4 and 4 give 2.
    assert [(stage["name"], stage["steps"])
            for stage in trained] == [("1-supervised", 4), ("4-retrain", 1), ("6-retrain", 2)]
    assert all(0 <= stage["miou"] <= 100 for stage in trained)
    masks = [read_index_mask(path) for path in sorted(out.glob("stages/[35]-label/masks/**/*.png"))]
    assert len(masks) == 4 and all(mask.max() < classes and mask.shape in {(40, 48), (56, 40)}
                                   for mask in masks)
    assert (out / "report" / "index.html").exists() and (out / "examples.png").exists()
