"""Draws photographs, their true classes, and the masks of several checkpoints, for README.md.

    python benchmarks/street_scene.py --root DATA/camvid --images val/0016E5_07959 --out docs/camvid.png \\
        "46 labels=runs/camvid/stages/1-supervised/best.pt" "ST++=runs/camvid/stages/6-retrain/best.pt"

One row a photograph. The root is laid out as CamVid's: images/, masks/.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import stpp
from stpp.images.palette import colourise

WIDTH, GAP, TITLE = 320, 6, 26
"""Pixels of a panel, between panels, and of the titles above them."""


def panels(root: Path, name: str, networks: dict[str, "stpp.ImagePredictor"]) -> dict[str, Image.Image]:
    """The panels of one photograph by title."""
    photograph, truth = (next((root / folder).glob(f"{name}.*")) for folder in ("images", "masks"))
    count = len(next(iter(networks.values())).classes)
    masks = {"true classes": np.asarray(Image.open(truth))} | {
        title: network.predict(photograph) for title, network in networks.items()}
    return {"photograph": Image.open(photograph).convert("RGB")} | {
        title: Image.fromarray(colourise(mask, count)) for title, mask in masks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", metavar="TITLE=CHECKPOINT")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--images", nargs="+", required=True, help="below images/, without the suffix")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    networks = {title: stpp.load(path) for title, path in (text.split("=", 1) for text in options.networks)}
    rows = [panels(options.root, name, networks) for name in options.images]
    first = rows[0]["photograph"]
    height = round(WIDTH * first.height / first.width)
    size = (len(rows[0]) * (WIDTH + GAP) - GAP, TITLE + len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for column, title in enumerate(rows[0]):
        draw.text((column * (WIDTH + GAP), 2), title, "black", font)
        for line, row in enumerate(rows):
            resample = Image.Resampling.NEAREST if column else Image.Resampling.LANCZOS
            sheet.paste(row[title].resize((WIDTH, height), resample),
                        (column * (WIDTH + GAP), TITLE + line * (height + GAP)))
    sheet.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
