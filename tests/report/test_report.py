"""Report's folder: its contents, no network access, and names of images that stay text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report_cases as cases
from stpp import cli
from stpp.config import Config
from stpp.errors import UserError
from stpp.images import palette
from stpp.label import rows
from stpp.report import build, charts, labelling
from stpp.report.labelling import Lowest
from stpp.run import run


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.facts, self._in_script = [], "", "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            self.facts += data
        else:
            self.text += data


def listed(report: Path) -> list[list]:
    found = []
    for path in sorted((report / "data").glob("rows-*.js")):
        text = path.read_text(encoding="ascii")
        assert text.startswith("report.add(") and text.endswith(");\n")
        found += json.loads(text[len("report.add("):-3])
    return found


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return cases.labels(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def report(labels) -> Path:
    build.write_report(labels, labels / "report")
    return labels / "report"


@pytest.fixture(scope="module")
def of_run(tmp_path_factory) -> Path:
    run = cases.run(tmp_path_factory.mktemp("run"))
    build.write_report(run, run / "report")
    return run / "report"


def test_labelled_images_are_listed_with_their_figures(labels, report):
    expected = {row["key"]: row for row in rows.read_parts(labels, "labels") if row["status"] == "ok"}
    found = {row[0]: row for row in listed(report)}
    assert found.keys() == expected.keys() >= {cases.key_of(name) for name in cases.HOSTILE}
    for key, (_, number, reliability, confidence, ignored, width, height, picture, shares) in found.items():
        row = expected[key]
        assert (number, reliability, width, height) == (0, None, row["width"], row["height"])
        assert confidence == pytest.approx(row["mean_confidence"], abs=1e-4) and ignored == pytest.approx(
            row["ignored_fraction"], abs=1e-4)
        pixels = dict(zip(shares[::2], shares[1::2], strict=True))
        assert pixels == {i: round(100 * n / (width * height), 1) for i,
                          n in enumerate(row["class_pixels"]) if n}
        assert picture >= 0
    assert any(row["ignored_fraction"] for row in expected.values())


def test_pictures_show_image_mask_and_ignored_pixels(labels, report):
    masks = {row[0]: (labels / "masks" / f"{row[0]}.png", row[7], row[4]) for row in listed(report)}
    for mask_path, picture, ignored in masks.values():
        mask = np.asarray(Image.open(mask_path))
        overlay = np.asarray(Image.open(report / "pictures" / f"{picture}-classes.png"))
        seen = Image.open(report / "pictures" / f"{picture}.jpg")
        assert overlay.shape == (*mask.shape, 4) and seen.size == mask.shape[::-1]
        assert np.array_equal(overlay[..., 3] == 0, mask == 255)
        assert (report / "pictures" / f"{picture}-ignored.png").exists() == bool(ignored)
        with Image.open(report / "pictures" / f"{picture}-confidence.jpg") as sure:
            assert sure.size == seen.size


def test_labels_without_confidence_map_lack_only_its_picture(tmp_path):
    folder = cases.labels(tmp_path, shard_size=4)
    parts = sorted((folder / "labels").glob("part-*.parquet"))
    older = {name: kind for name, kind in rows.LABELS.items() if name != "confidence_map"}
    rows.write(parts[0], [{name: row[name] for name in older} for row in rows.read(parts[0])], older)
    cut = rows.read(parts[1])
    rows.write(parts[1], [row | {"confidence_map": (row["confidence_map"] or b"")[:-1]} for row in cut],
               rows.LABELS)
    build.write_report(folder, tmp_path / "report")
    pictures = tmp_path / "report" / "pictures"
    unmapped = {row["key"] for part in parts[:2] for row in rows.read(part, ["key"])}
    assert 4 < len(unmapped) < cases.GOOD + len(cases.HOSTILE)
    for key, *_, picture, _ in listed(tmp_path / "report"):
        assert (pictures / f"{picture}.jpg").exists() and (pictures / f"{picture}-classes.png").exists()
        assert (pictures / f"{picture}-confidence.jpg").exists() == (key not in unmapped)


def test_page_needs_no_network_and_names_are_never_markup(report):
    page = Page(report / "index.html")
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [one.get("src", one.get("type"))
            for one in scripts] == ["report.js", "data/rows-0.js", "application/json"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            target = attributes.get(name, "")
            assert target.startswith("data:image/png;base64,") or ":" not in target and "//" not in target, (
                target
            )
    assert not [attributes for tag, attributes in page.tags if attributes.get("src") == "x"]
    assert json.loads(page.facts)["classes"] == list("0123")
    for name in ("report.js", "report.css"):
        assert "http" not in (report / name).read_text()


def test_failed_images_are_listed_with_their_reasons(report):
    page = Page(report / "index.html")
    assert "<b>bad</b>.jpg" in page.text and "not one of the formats" in page.text


def test_archives_of_masks_give_the_same_pictures(labels, report, tmp_path):
    tarred = cases.labels(tmp_path, output="tar")
    build.write_report(tarred, tmp_path / "report")
    assert {row[0]: row[3:7]
            for row in listed(tmp_path / "report")} == {row[0]: row[3:7] for row in listed(report)}
    assert len(list((tmp_path / "report" / "pictures").glob("*-classes.png"))) == len(listed(report))


def test_run_page_shows_stages_curves_scores_and_threshold(of_run):
    page = Page(of_run / "index.html")
    assert "61.50" in page.text and "12" in page.text and "unfinished" in page.text
    assert "<i>sky" in page.text and "71.25" in page.text
    facts = json.loads(page.facts)
    found = listed(of_run)
    assert facts["labellings"] == ["3-label"] and facts["classes"] == ["<i>sky", "b", "c", "d"]
    assert sum(row[2] >= facts["threshold"] for row in found) == len(found) - len(found) // 2
    assert len([1 for tag, _ in page.tags if tag == "polyline"]) == 4
    assert "holds no index" in page.text  # reason why no drift is known
    assert json.loads((of_run / "report.json").read_text())["bad"] == 1


def test_missing_images_and_masks_lack_only_their_pictures(tmp_path):
    out = cases.labels(tmp_path)
    (tmp_path / "in" / "ünï\u0301 – 火.jpg").unlink()
    next((out / "masks" / "one").iterdir()).unlink()
    build.write_report(out, tmp_path / "report")
    found = listed(tmp_path / "report")
    assert len([row for row in found if row[7] < 0]) == 2 and len(found) == cases.GOOD + len(cases.HOSTILE)


def test_few_pictures_are_the_worst_and_random_ones(labels, tmp_path):
    build.write_report(labels, tmp_path / "report", most_pictures=4)
    drawn = [row for row in listed(tmp_path / "report") if row[7] >= 0]
    assert len(drawn) == 4
    assert min(listed(tmp_path / "report"), key=lambda row: row[3])[0] in [row[0] for row in drawn]


def image(key: str, confidence: float = 0.5) -> labelling.Image:
    return labelling.Image(key=key, part="part-000000", width=1, height=1, confidence=confidence, ignored=0.0,
                           reliability=None, shares=())


def test_lowest_of_many_images_are_kept():
    kept = Lowest(10, lambda one: one.confidence)
    for i in range(1000):
        kept.offer(image(str(i), (i * 7919 % 1000) / 1000))
    assert sorted(one.confidence for one in kept.values()) == [i / 1000 for i in range(10)]


def test_images_beyond_the_limit_are_sampled_and_the_worst_kept(labels, monkeypatch):
    monkeypatch.setattr(labelling, "MOST_LISTED", 3)
    monkeypatch.setattr(labelling, "MOST_WORST", 2)
    found = labelling.read(labels, "labels", {})
    table = [row for row in rows.read_parts(labels, "labels") if row["status"] == "ok"]
    worst = sorted(table, key=lambda row: row["mean_confidence"])[:2]
    assert 3 <= len(found.listed) <= 9 < found.totals.images
    assert {row["key"] for row in worst} <= {one.key for one in found.listed}


@pytest.mark.parametrize(("share", "labelled", "factor"), [
    (0.2, 0.1, 2.0), (0.19, 0.1, None), (0.05, 0.1, 0.5), (0.0, 0.1, 0.0), (0.1, 0.0, float("inf")),
    (0.0005, 0.0001, None), (0.3, None, None)])
def test_class_drift_by_factor(share, labelled, factor):
    assert build._factor(share, labelled) == factor


def test_curves_are_thinned_and_keep_their_end():
    drawn = charts.curve("loss", [(i, float(i)) for i in range(10_000)] + [(10_000, float("nan"))])
    assert len(drawn.points.split()) <= charts.MOST_POINTS + 1 and drawn.points.endswith("240.0,0.0")
    assert (
        charts.curve("loss", [(1, float("inf"))]) is None
        and charts.curve("flat", [(3, 2.0)]).points == "0.0,0.0"
    )


def test_colours_of_neighbouring_classes_differ():
    colours = palette.palette(24).astype(int)[:24]
    apart = np.abs(colours[:, None] - colours[None]).sum(2) + 999 * np.eye(24, dtype=int)
    assert apart.min() >= 30
    striped = palette.overlay(np.full((12, 12), 9, dtype=np.uint8), 24)
    assert len(np.unique(striped[..., 3])) == 2  # beyond the eighth class: not only by colour


def test_command_prints_the_page_and_refuses_foreign_folders(labels, tmp_path, capsys):
    cli.main(["report", str(labels), "--out", str(tmp_path / "page"), "--pictures", "2"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page" / "index.html")
    # its own may be replaced
    cli.main(["report", str(labels), "--out", str(tmp_path / "page"), "--pictures", "2"])
    (tmp_path / "mine").mkdir()
    for args, words in ((["absent"], "absent"), ([str(tmp_path / "mine")], "neither a run"),
                        ([str(labels), "--out", str(tmp_path / "mine")], "not a report"),
                        ([str(labels), "--run", "absent"], "--run"),
                        ([str(labels), "--pictures", "-1"], "--pictures")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *args])
        errors = capsys.readouterr().err
        assert ended.value.code == 2 and words in errors and len(errors.strip().splitlines()) == 1
    assert list((tmp_path / "mine").iterdir()) == []


def test_failed_report_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise UserError("no room\nat all")

    monkeypatch.setattr(run, "write_report", fails)
    begun = run.Run.__new__(run.Run)
    begun.config, begun.val = Config(out=tmp_path), []
    begun.finish({"stages": []})
    assert "no report was written (no room at all)" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists()


@pytest.mark.parametrize(("scores", "limit"), [
    ([(0.9, True), (0.8, True), (0.8, False), (0.1, False)], 0.8),
    ([(0.9, True), (0.3, True), (0.8, False), (0.1, False)], None),
    ([], None),
])
def test_limit_of_reliability_is_shown_only_if_there_is_one(tmp_path, scores, limit):
    """A selection by class has a limit for each class."""
    table = [{"key": str(i), "reliability": score, "reliable": flag}
             for i, (score, flag) in enumerate(scores)]
    rows.write(tmp_path / "reliability.parquet", table, rows.RELIABILITY)
    assert labelling.reliabilities(tmp_path / "reliability.parquet")[1] == limit
