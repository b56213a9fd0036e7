"""Data card: its numbers, its text, its contact sheet, and both in the report."""

import json

import numpy as np
import pytest
from PIL import Image

from dataset_cases import data_set, ids, paletted, photo, prepare
from stpp import cli
from stpp.dataset import card
from stpp.report import run as runs
from stpp.report.build import write_report


@pytest.fixture
def root(tmp_path):
    root = data_set(
        tmp_path / "data",
        {
            "train/a": ids(1, 255),
            "train/b": ids(1, 2),
            "val/c": paletted(ids(2), (0, 0, 0), (200, 0, 0), (0, 0, 200)),
        },
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (20, 10)).save(root / "photos" / "d.jpg", exif=exif)
    Image.fromarray(np.full((10, 20), 5000, np.uint16)).save(root / "photos" / "e.png")
    photo(root / "photos" / "f.jpg", 6).rename(root / "photos" / "f.heic")
    return root


def test_card_counts_the_data_set(root):
    made = prepare(root)
    values = json.loads((made.out / card.JSON).read_text())
    assert values["counts"] == {"images": 5, "masks": 3, "converted": 1}
    assert values["images"] == {
        "format": {"JPEG": 4, "PNG": 1},
        "colour model": {"RGB": 3, "inverted CMYK": 1, "gray": 1},
        "bits": {"8": 4, "16": 1},
        "orientation": {"1": 4, "6": 1},
    }
    assert values["sizes"] == {
        "different": 3,
        "smallest_side_px": 10,
        "largest_side_px": 32,
        "common": {"32x24": 3, "10x20": 1, "20x10": 1},
    }
    assert values["masks"] == {"gray, 8 bits": 2, "palette, 2 bits": 1}
    assert [(one["name"], one["pixels"], one["images"]) for one in values["classes"]] == [
        ("background", 3 * 768 - 5 * 80, 3),
        ("leaf", 160, 2),
        ("stem", 160, 2),
    ]
    assert values["ignored"]["pixels"] == 80 and values["splits"] == {"validation": 1, "test": 0, "others": 4}
    assert any(".heic" in text for text in values["warnings"]) and list(made.warnings) == values["warnings"]
    text = (made.out / card.TEXT).read_text()
    for part in ("JPEG (4), PNG (1)", "CMYK (1)", "255 (ignore)", "32x24 (3)", "validation 1", "1 .heic"):
        assert part in text


def test_contact_sheet_shows_images_with_masks(root):
    made = prepare(root)
    with Image.open(made.out / card.SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[1] > 2 * 240 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    plain = data_set(root.parent / "plain" / "data", {"x": None})
    made = prepare(plain, masks=None)
    assert (made.out / card.SHEET).exists() and json.loads((made.out / card.JSON).read_text())["masks"] == {}


def test_prepare_prints_the_card(root, tmp_path, capsys):
    flags = ["--data.root", str(root), "--data.layout", "globs", "--data.images", "photos/**/*",
             "--data.masks", "labels/**/*.png", "--out", str(tmp_path / "out")]
    cli.main(["prepare", *flags])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("5 images, 3 with a mask, 3 classes") and any(
        "CMYK (1)" in line for line in printed
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", "--strict", *flags])
    assert ended.value.code == 2 and "stpp: --strict: skipped: 1 .heic" in capsys.readouterr().err


def test_report_finds_the_card_of_a_run(root, tmp_path):
    made = prepare(root)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"data": {"index": str(made.out)}}))
    text, sheet = runs.data_card(run)
    assert "CMYK (1)" in text and sheet == made.out / card.SHEET
    (run / "stages").mkdir()
    write_report(run, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "CMYK (1)" in page and 'src="pictures/contact-sheet.png"' in page
    assert (tmp_path / "report" / "pictures" / card.SHEET).read_bytes() == sheet.read_bytes()
    (made.out / card.TEXT).unlink()
    assert runs.data_card(run) == ("", None)
    write_report(run, tmp_path / "report")
    assert 'id="data"' not in (tmp_path / "report" / "index.html").read_text()
