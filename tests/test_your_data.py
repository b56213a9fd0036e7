"""Guide for one's own data, followed exactly on photographs in a realistic folder.

Every command is the page's own, in its order. Only steps, sizes and the network are smaller.
"""

import json
import re
import shlex
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stpp import cli
from stpp.images.masks import read_index_mask
from test_docs import ROOT, commands

PAGE = ROOT / "docs" / "your-data.md"
SMALL = ("--device cpu --model.backbone resnet18 --model.output-stride 32 --model.pretrained none "
         "--augment.crop-px 49 --augment.long-side 60 120 --train.epochs 1 --train.supervised-epochs 2 "
         "--train.batch-global 4 --train.lr 0.02 --label.tta none --data.threads 1").split()
# Photographs, whether they have a mask, and their EXIF orientation. Some have other colours than RGB.
PHOTOS = [
    ("IMG_0001.JPG", True, 1), ("IMG 0002.jpg", True, 6), ("été à la mer/IMG_0001.JPG", True, 1),
    ("été à la mer/b.Png", True, 1), ("été à la mer/c.jpeg", True, 8),
    ("Neuer Ordner (2)/größe.v2.JPG", True, 3), ("Neuer Ordner (2)/b.PNG", True, 1),
    ("Neuer Ordner (2)/c.jpg", True, 1), ("été à la mer/sans masque.JPG", False, 6),
    ("Neuer Ordner (2)/d.Jpg", False, 1), ("deep/er/e.jpg", False, 1), ("deep/er/f (1).JPEG", False, 5)]
MODES = {"été à la mer/b.Png": "RGBA", "Neuer Ordner (2)/b.PNG": "P", "Neuer Ordner (2)/c.jpg": "CMYK",
         "Neuer Ordner (2)/d.Jpg": "L"}
BROKEN = "deep/er/half a download.JPG"
STORED = {1: (), 3: (Image.Transpose.ROTATE_180,), 5: (Image.Transpose.TRANSPOSE,),
          6: (Image.Transpose.ROTATE_90,), 8: (Image.Transpose.ROTATE_270,)}
"""Transposition of an upright image that viewers which apply the orientation show upright."""


def folder(root: Path, camvid: Path) -> Path:
    """Writes twelve photographs of CamVid and a truncated one; eight palette masks and one of a missing
    photograph; class names; and leftovers of systems."""
    given = json.loads((camvid / "classes.json").read_text())
    sources = sorted((camvid / "images" / "train").iterdir())[:: 367 // len(PHOTOS)]
    for i, (name, labelled, orientation) in enumerate(PHOTOS):
        with Image.open(sources[i]) as whole:
            photo = whole.convert("RGB").resize((120, 90) if i % 3 else (90, 120))
        mask = Image.open(camvid / "masks" / "train" / f"{sources[i].stem}.png").resize(
            photo.size, Image.Resampling.NEAREST
        )
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for turn in STORED[orientation]:
            photo = photo.transpose(turn)
        photo.convert(MODES.get(name, "RGB")).save(path, **({"exif": exif} if orientation > 1 else {}))
        if labelled:
            paletted = Image.new("P", mask.size)
            paletted.putdata(np.asarray(mask).ravel().tolist())
            paletted.putpalette([part for colour in given["palette"] for part in colour]
                                + [0] * 3 * (256 - len(given["classes"])))
            stem = unicodedata.normalize("NFD", name.rpartition(".")[0])  # as other systems write accents
            path = root / "labels" / f"{stem}.{'PNG' if i % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            paletted.save(path)
    whole = (root / "photos" / "deep/er/e.jpg").read_bytes()
    (root / "photos" / BROKEN).write_bytes(whole[: len(whole) // 2])
    shutil.copy(root / "labels" / "IMG 0002.PNG", root / "labels" / "deleted long ago.png")
    for name in (".DS_Store", "photos/Thumbs.db", "photos/deep/notes.txt", "labels/._b.png"):
        (root / name).write_bytes(b"left behind")
    (root / "classes.json").write_text(json.dumps(given["classes"]))
    return root


def stpp(text: str, *more: str) -> None:
    """Runs a command of the page."""
    cli.main([*shlex.split(text, comments=True), *more])


@pytest.mark.slow
def test_guide_leads_from_a_real_folder_to_masks(tmp_path, camvid, monkeypatch, capsys):
    data = folder(tmp_path / "DATA", camvid)
    files = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    prepare, train, many_gpus, evaluate, predict, retrain = commands(PAGE)

    # 3. Check: the broken photograph is named, with a message that the page explains.
    with pytest.raises(SystemExit) as ended:
        stpp(prepare)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stpp: ")]
    assert ended.value.code == 2 and f"photos/{BROKEN}: cannot be read as an image" in said
    assert "| `cannot be read as an image` | replace the file, or move it out of DATA |" in page
    shutil.move(data / "photos" / BROKEN, tmp_path)
    stpp(prepare)
    printed = capsys.readouterr()
    assert "12 images, 8 with a mask, 11 classes" in printed.out and "CMYK (1)" in printed.out
    assert "1 .txt: unsupported formats" in printed.err and "1 Thumbs.db" in printed.err
    prepared = tmp_path / "runs" / "mine-index"
    made = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir() if path.is_file()
            and path.name != ".in-use"}  # the lock of runs that read the index
    assert {"card.txt", "card.json", "contact-sheet.png"} < made.keys()
    assert "masks that belong to no image: 1, for example labels/deleted long ago.png" in printed.err
    assert "`masks that belong to no image` |" in page

    # 2. and 4. The page's recipe, and training.
    (tmp_path / "mine.toml").write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1], encoding="utf-8")
    stpp(train, *SMALL)
    assert shlex.split(many_gpus, comments=True) == shlex.split(train)  # the same, under torchrun
    assert {name: (prepared / name).stat().st_mtime_ns for name in made} == made  # not made again
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]][-1] == "6-retrain" and results["control"]["steps"]
    lists = {path.stem: path.read_text().splitlines()
             for path in (tmp_path / "runs" / "mine" / "split").iterdir()}
    assert {name: len(lines) for name, lines in lists.items()} == {"labeled": 6, "unlabeled": 4, "val": 2}

    # 5. Look.
    stpp(evaluate, "--device", "cpu")
    assert "2 images" in capsys.readouterr().out
    stpp(predict, "--device", "cpu")
    made = tmp_path / "runs" / "mine-masks"
    assert len(json.loads((made / "classes.json").read_text())["classes"]) == 11
    for i, (name, _, _) in enumerate(PHOTOS):
        mask = read_index_mask(made / "masks" / f"{name.rpartition('.')[0]}.png")
        assert mask.shape == ((90, 120) if i % 3 else (120, 90)) and mask.max() < 11
        assert Image.open(made / "overlays" / f"{name.rpartition('.')[0]}.png").size == mask.shape[::-1]
    shutil.copy(data / "photos" / "IMG 0002.jpg", "photo.jpg")
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip().splitlines()[-1] in json.loads((data / "classes.json").read_text())
    label, export = re.findall(r"`stpp ((?:label|export) .*?)`", page, re.DOTALL)
    stpp(label.replace("FOLDER", "DATA/photos").replace("OUT", "runs/labels"), "--tta", "none")
    assert len(list((tmp_path / "runs" / "labels" / "masks").rglob("*.png"))) == 12
    stpp(export)
    assert (tmp_path / "best.onnx").exists()

    # 6. Better.
    (tmp_path / "bad.txt").write_text("\n".join(lists["unlabeled"][:1]) + "\n")
    stpp(retrain, *SMALL)
    assert (
        json.loads((tmp_path / "runs" / "mended" / "results.json").read_text())["stages"][0]["name"]
        == "1-retrain"
    )

    (tmp_path / "half a download.JPG").rename(data / "photos" / BROKEN)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == files
