"""Report of a run's classes: shares of the pixels, and calibrations."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import report_cases as cases
from stpp.inference import calibration
from stpp.inference.calibration import BINS, Calibration
from stpp.report import build
from stpp.report import calibration as drawing
from stpp.report import run as runs

NAMES = ("<i>sky", "b", "c")


def calibrated(seed: int = 0) -> Calibration:
    """Calibrates classes of which the last is never predicted."""
    rng = np.random.default_rng(seed)
    counted = rng.integers(1, 50, (3, BINS))
    counted[2] = 0
    right = (counted * np.linspace(0.3, 1, BINS)).astype(np.int64)
    return Calibration(classes=NAMES, all_CB=counted, right_CB=right, images=4, tta="flip", network="w",
                       held_out="h")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = cases.run(tmp_path_factory.mktemp("run"))
    stage = run / "stages" / "1-supervised"
    by_class = {"labelled_pct": dict(zip(NAMES, (60.0, 39.5, 0.5), strict=True)),
                "confident_pct": dict(zip(NAMES, (70.0, 29.99, 0.01), strict=True)),
                "confident_ratio": dict(zip(NAMES, (1.17, 0.76, 0.02), strict=True))}
    rows = [{"step": 900, **by_class}, {"step": 1000, **by_class | {"confident_ratio": dict.fromkeys(NAMES)}}]
    with open(stage / "metrics.jsonl", "a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows[::-1]))
    calibration.write(stage / "calibration.json", calibrated(), [0.9])
    (run / "stages" / "4-retrain" / "calibration.json").write_text("{")  # damaged: the page shows the others
    build.write_report(run, run / "report")
    return (run / "report" / "index.html").read_text(encoding="utf-8")


def test_page_shows_the_last_shares_and_marks_missing_classes(page):
    assert "Classes of <bdi>1-supervised</bdi>: labelled and confident pixels, %, at step 900" in page
    rows = re.findall(r"<tr><th scope=\"row\"><bdi>(\S+?)</bdi></th><td>([\d.]+)</td><td>([\d.]+)</td>\s*"
                      r"<td( class=\"drift\")?>([\d.]+)( ▼)?</td></tr>", page)
    assert rows == [("&lt;i&gt;sky", "60.000", "70.000", "", "1.17", ""),
                    ("b", "39.500", "29.990", "", "0.76", ""),
                    ("c", "0.500", "0.010", ' class="drift"', "0.02", " ▼")]


def test_page_draws_calibrations_with_names_as_text(page):
    assert page.count("Coverage against precision of") == 1
    assert page.count("<polyline points") == 4 + 3  # curves of the stage; two classes and all pixels
    assert "<title>&lt;i&gt;sky</title>" in page and "<i>sky" not in page


def test_curve_starts_at_full_coverage_and_overall_precision():
    found = calibrated()
    drawn = drawing.figure(found, title="t")
    assert [line.name for line in drawn.lines] == ["<i>sky", "b", "all"]
    x, y = map(float, drawn.lines[-1].points.split()[0].split(","))
    assert x == drawing.WIDTH
    assert 1 - y / drawing.HEIGHT * (1 - drawn.least) == pytest.approx(found.accuracy(), abs=0.002)
    assert all(0 <= float(point.split(",")[1]) <= drawing.HEIGHT for line in drawn.lines
               for point in line.points.split())


def test_plot_is_a_standalone_svg(tmp_path: Path):
    text = drawing.plot(calibrated(), title="a & <b>")
    assert text.startswith("<svg xmlns=") and "a &amp; &lt;b&gt;" in text
    import xml.etree.ElementTree as tree

    assert len(tree.fromstring(text).findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_damaged_rows_by_class_are_skipped(tmp_path):
    (tmp_path / "stages" / "a").mkdir(parents=True)
    rows = '{"step": 1, "labelled_pct": 5}\n{"step": 2, "lab'
    (tmp_path / "stages" / "a" / "metrics.jsonl").write_text(rows)
    (stage,) = runs.stages(tmp_path)
    assert stage.shares is None
