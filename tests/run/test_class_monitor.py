"""Monitor of a run's classes: warnings before training, after stages, and about pseudo labels."""

import json
from pathlib import Path

import pytest

from dataset_cases import GLOBS, data_set, ids, prepare
from stpp.dataset import splits
from stpp.dataset.notes import Notes
from stpp.errors import UserError
from stpp.loading.sample import Sample
from stpp.run import class_monitor
from stpp.run.class_monitor import ClassMonitor, pseudo_pixels

CLASSES = ("background", "leaf", "stem")


def monitor(tmp_path: Path, masks: dict) -> ClassMonitor:
    known = prepare(data_set(tmp_path / "root", masks), **GLOBS)
    samples = [known.sample(image) for image in sorted(known.entries)]
    return ClassMonitor.of(known, samples[:3], samples[3:], advice=", --more")


def test_scarce_classes_are_named_before_training(tmp_path):
    monitored = monitor(tmp_path, {"a": ids(1), "b": ids(1), "c": ids(), "d": ids(2)})
    assert monitored.images == [3, 2, 0] and monitored.labelled[1] == 2 * 80 and monitored.validated[2] == 80
    notes = Notes(quiet=True)
    monitored.warn_scarce(Path("labeled.txt"), notes)
    (warning,) = notes.warnings
    assert warning == ("labeled.txt: no labelled pixel of stem: it cannot be learned; label an image that "
                       "shows it")
    assert notes.lines == []


def test_class_in_a_single_image_is_named(tmp_path):
    monitored = monitor(tmp_path, {"a": ids(1), "b": ids(1, 2), "c": ids(1), "d": ids(2)})
    notes = Notes(quiet=True)
    monitored.warn_scarce(Path("labeled.txt"), notes)
    assert notes.warnings == []
    assert notes.lines == ["labeled.txt: only one image shows stem: the network learns it from that image "
                           "alone; label more images that do"]


def test_single_labelled_image_names_no_class(tmp_path):
    known = prepare(data_set(tmp_path / "root", {"a": ids(1, 2), "b": ids(1)}), **GLOBS)
    monitored = ClassMonitor.of(known, [known.sample("photos/a.jpg")], [], advice="")
    monitored.warn_scarce(Path("labeled.txt"), notes := Notes(quiet=True))
    assert notes.lines == notes.warnings == []


def made(**changes) -> ClassMonitor:
    return ClassMonitor(**{"classes": CLASSES, "labelled": [900, 95, 5], "images": [9, 7, 2],
                           "validated": [100, 10, 1], "advice": ", --more"} | changes)


def test_a_lost_class_is_named_once_with_its_figures(capsys):
    monitored = made()
    monitored.warn_lost("1-supervised", {"background": 90.0, "leaf": 1.5, "stem": 0.25})
    said = capsys.readouterr().err
    assert ("warning: class stem has an IoU of 0.25 % after 1-supervised; it has 0.5 % of the labelled "
            "pixels, in 2 images") in said
    assert "leaf" not in said and "--rare.sampling 0.25" in said and ", --more; docs/" in said
    monitored.warn_missing([90, 10, 0], "pseudo-labelled pixels")
    assert capsys.readouterr().err == ""  # it was named
    monitored.warn_missing([100, 0, 0], "pixels that 2-label labelled")
    assert "class leaf has 9.5 % of the labelled pixels and 0 % of the pixels that" in capsys.readouterr().err


def test_classes_absent_from_validation_or_labels_are_not_lost(capsys):
    made(validated=[100, 10, 0]).warn_lost("s", {"background": 90.0, "leaf": 50.0, "stem": 0.0})
    made(images=[9, 7, 0], labelled=[900, 95, 0]).warn_lost(
        "s", {"background": 90.0, "leaf": 50.0, "stem": 0.0})
    made().warn_lost("s", {})  # no validation list
    made().warn_lost("s", {"background": 90.0, "leaf": 50.0, "stem": float("nan")})
    assert capsys.readouterr().err == ""


def test_many_lost_classes_are_summarised(capsys):
    names = tuple(f"c{i}" for i in range(20))
    monitored = ClassMonitor(classes=names, labelled=[1] * 20, images=[2] * 20, validated=[1] * 20)
    monitored.warn_lost("s", dict.fromkeys(names, 0.0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == class_monitor.SHOWN + 2
    assert lines[-2] == f"warning: the same holds for {', '.join(names[8:])}"


def sample(mask: Path, strong: bool = True) -> Sample:
    return Sample(key=mask.stem, image="x.jpg", mask=str(mask), width=4, height=4, strong=strong)


def test_pseudo_labels_of_several_stages_are_summed(tmp_path):
    stages, given = tmp_path / "stages", tmp_path / "given" / "given.json"
    samples = [sample(tmp_path / "labels" / "a.png", strong=False)]
    assert pseudo_pixels(samples, stages, given) is None
    for name, counts in (("3-label", [5, 1, 0]), ("5-label", [2, 2, 2])):
        (stages / name).mkdir(parents=True)
        (stages / name / "summary.json").write_text(json.dumps({"class_pixels": counts}))
    samples += [sample(stages / "3-label" / "masks" / name) for name in ("b.png", "c.png")]
    assert pseudo_pixels(samples, stages, given) == [5, 1, 0]
    samples.append(sample(stages / "5-label" / "masks" / "d" / "e.png"))
    assert pseudo_pixels(samples, stages, given) == [7, 3, 2]
    assert pseudo_pixels([sample(tmp_path / "mine" / "f.png")], stages, given) is None
    given.parent.mkdir()
    given.write_text(json.dumps({"class_pixels": [1, 1, 1]}))
    assert pseudo_pixels([sample(tmp_path / "mine" / "f.png")], stages, given) == [1, 1, 1]


def test_held_out_images_are_a_share_and_the_same_in_every_call(tmp_path):
    known = prepare(data_set(tmp_path / "root", {f"i{n:02d}": ids(1) for n in range(20)}), **GLOBS)
    samples = [known.sample(image) for image in sorted(known.entries)]
    kept, held = splits.held_out(samples, 0.12, 7)
    assert len(held) == 3 and sorted(kept + held, key=lambda one: one.key) == samples
    again = splits.held_out(samples[::-1], 0.12, 7)
    assert {one.key for one in again[1]} == {one.key for one in held}
    assert {one.key for one in splits.held_out(samples, 0.12, 8)[1]} != {one.key for one in held}
    with pytest.raises(UserError, match="--advise.share 0.96 leaves no labelled image of 20"):
        splits.held_out(samples, 0.96, 7)
