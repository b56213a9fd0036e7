"""Files of annotation tools with any damage are read, or refused in one line that names the file."""

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shape_cases import coco as coco_object
from stpp.annotations import coco, cvat, labelme, yolo
from stpp.annotations.regions import Outline, ring
from stpp.annotations.shapes import Annotated, Legend, Shape, draw
from stpp.errors import UserError
from test_hostile import damaged

RELAXED = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEGEND = Legend(classes={1: 1, 7: 2, "leaf": 1, 0: 1}, names={}, unlisted=0)
COCO = json.dumps(
    coco_object(
        {"ä.jpg": [{}, {"segmentation": {"size": [24, 32], "counts": [5, 3, 760]}}], "b.jpg": [{}]},
        {1: "leaf", 7: "stem"},
    ),
    ensure_ascii=False,
).encode()
LABELME = json.dumps(
    {
        "shapes": [
            {"label": "leaf", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"},
            {"label": "leaf", "points": [[1, 1], [9, 9]], "shape_type": "circle"},
        ],
        "imagePath": "a.jpg",
        "imageWidth": 32,
        "imageHeight": 24,
    }
).encode()


def drawn_or_refused(path, read) -> None:
    """Reads a damaged file; its shapes are drawn, or listed as problems."""
    try:
        found = read()
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return
    for one in found:
        made = draw(one, 24, 32, LEGEND)
        assert made.mask_HW.shape == (24, 32) and all("\n" not in text for text in made.problems)


@RELAXED
@given(st.data())
def test_damaged_coco(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data.draw(damaged(COCO)))

    def read() -> list[Annotated]:
        coco._listing.cache_clear()  # files written in quick succession may have equal stamps
        return [coco.read(path, one.parts, one.size) for one in coco.listing(path).images if one.parts]

    drawn_or_refused(path, read)


@RELAXED
@given(st.data())
def test_damaged_labelme(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data.draw(damaged(LABELME)))
    drawn_or_refused(path, lambda: [labelme.read(path)])


@RELAXED
@given(st.data())
def test_damaged_yolo(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data.draw(damaged(b"0 0.1 0.1 0.5 0.1 0.5 0.9\n7 0.2 0.2 0.4 0.2 0.4 0.4 0.2 0.4\n")))
    drawn_or_refused(path, lambda: [yolo.read(path, 32, 24)])


@RELAXED
@given(st.data())
def test_damaged_labelmaps(tmp_path, data):
    path = tmp_path / "labelmap.txt"
    text = b"# label:color_rgb:parts:actions\nbackground:0,0,0::\nleaf:128,0,0::\n"
    path.write_bytes(data.draw(damaged(text)))
    try:
        cvat.labels(path)
    except UserError as error:
        assert "labelmap.txt" in str(error) and "\n" not in str(error)


@RELAXED
@given(st.lists(st.floats(-40, 80), min_size=6, max_size=24).filter(lambda values: len(values) % 2 == 0))
def test_any_outline_is_drawn_or_reported(values):
    """Never writes outside the mask, and a lenient legend always gives a mask."""
    shape = Shape("annotation 1", 1, Outline((ring(values),)))
    made = draw(Annotated(None, [shape]), 24, 32, LEGEND)
    assert made.problems or set(made.mask_HW.ravel().tolist()) <= {0, 1}
    lenient = Legend(classes=LEGEND.classes, names={}, unlisted=0, lenient=True)
    made = draw(Annotated(None, [shape]), 24, 32, lenient)
    assert not made.problems and set(made.mask_HW.ravel().tolist()) <= {0, 1, 255}
