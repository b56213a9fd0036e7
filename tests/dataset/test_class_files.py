"""Class lists in the files of tools: read if the order is unambiguous, otherwise refused."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stpp.dataset import class_files, index
from stpp.dataset.classes import class_list
from stpp.errors import UserError

NAMES = ["background", "leaf", "stem"]


@pytest.mark.parametrize(
    "value",
    [
        NAMES,
        {"classes": NAMES},
        {"0": "background", "1": "leaf", "2": "stem"},
        {"2": "stem", "0": "background", "1": "leaf"},
        {"background": 0, "stem": 2, "leaf": 1},
        {
            "categories": [
                {"id": 1, "name": "leaf"},
                {"id": 0, "name": "background"},
                {"id": 2, "name": "stem"},
            ]
        },
        {"classes": [{"title": name, "color": "#fff"} for name in NAMES]},
        [{"name": name} for name in NAMES],
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_forms_of_tools_are_read(tmp_path, value, encoding):
    (tmp_path / "classes.json").write_bytes(
        json.dumps(value, indent=1).replace("\n", "\r\n").encode(encoding)
    )
    assert class_list(tmp_path, "globs").names == NAMES


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            {"categories": [{"id": 1, "name": "leaf"}, {"id": 2, "name": "stem"}]},
            r"its ids \(1, 2\) are not 0, 1, 2",
        ),
        ({"leaf": 1, "stem": 2}, "--data.mask-map"),
        ({"1": "leaf", "3": "stem"}, "once each"),
        ({"a": 0, "b": 0}, "once each"),
        ({"classes": [{"title": "a", "id": 5812}, {"title": "b", "id": 5813}]}, "as class ids must be"),
        ([{"name": "a"}, {"colour": "b"}], "list of class names"),
        ({"names": 3}, "once each"),
        ({"names": "a b"}, "list of class names"),
    ],
)
def test_json_of_ambiguous_order_is_refused(tmp_path, value, said):
    (tmp_path / "classes.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=said):
        class_list(tmp_path, "globs")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "labelmap.txt",
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nleaf:128,0,0::\nstem:0,128,0::\n",
        ),
        ("class_names.txt", "background\r\nleaf\r\nstem\r\n"),
        ("classes.txt", "\ufeffbackground\nleaf\n\nstem"),
        ("classes.txt", "0: background\n2: stem\n1: leaf\n"),
        ("classes.txt", "0 background\n1 leaf\n2 stem\n"),
        ("obj.names", "__ignore__\nbackground\nleaf\nstem\n"),
        ("data.yaml", "path: x\nnc: 3\nnames: [background, leaf, stem]\n"),
        ("data.yaml", "names:\n  0: background\n  1: leaf\n  2: stem\n"),
    ],
)
def test_other_files_name_the_classes(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = class_list(tmp_path, "voc")
    assert (found.names, found.source, found.of_layout) == (NAMES, str(tmp_path / name), False)


@pytest.mark.parametrize(
    "text",
    [
        '["background", "leaf", "stem",]',
        "['background', 'leaf', 'stem']",
        '{"names": ["background", "leaf ", " stem"]}',
        '[{"label": "background"}, {"label": "leaf"}, {"label": "stem"}]',
        "{'0': 'background', '1': 'leaf', '2': 'stem'}",
    ],
)
def test_handwritten_json_is_read(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    assert class_list(tmp_path, "globs").names == NAMES


@pytest.mark.parametrize(
    "text",
    [
        "id,name\n0,background\n1,leaf\n2,stem\n",
        "id\tname\n2\tstem\n1\tleaf\n0\tbackground\n",
        "value: class\n0: background\n1: leaf\n2: stem\n",
    ],
)
def test_header_of_an_id_table_is_no_class(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    assert class_list(tmp_path, "globs").names == NAMES


@pytest.mark.parametrize(
    "text",
    [
        "item {\n  id: 1\n  name: 'leaf'\n}\n",
        "names: [background, leaf, stem]\nnc: 3\n",
        "<classes>\n<name>leaf</name>\n</classes>\n",
        "0,background\nleaf\n2,stem\n",
    ],
)
def test_texts_without_class_names_are_refused(tmp_path, text):
    """Their lines would become classes, and every id would mean another one."""
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(UserError, match=r"labelmap\.txt: .*list of names in the order of their ids"):
        class_list(tmp_path, "globs")


def test_names_that_differ_by_spaces_are_equal(tmp_path):
    (tmp_path / "classes.json").write_text('["background", "leaf", "leaf "]')
    with pytest.raises(UserError, match="distinct class names"):
        class_list(tmp_path, "globs")


@pytest.mark.parametrize("name", ["unlabelled area", "Void (sky)", "ignore_region", "2 unlabeled"])
def test_longer_names_of_ignore_are_refused(name):
    with pytest.raises(UserError, match="would be learned like the others"):
        class_list(".", "globs", ("background", name))
    assert class_list(".", "globs", ("background", "avoided", "devoid")).names[1:] == ["avoided", "devoid"]


def test_names_with_numbers_are_names(tmp_path):
    (tmp_path / "classes.txt").write_text("road 1\nroad 2\n3 way crossing\n")
    assert class_list(tmp_path, "globs").names == ["road 1", "road 2", "3 way crossing"]


def test_two_files_must_agree_and_classes_json_wins(tmp_path):
    (tmp_path / "class_names.txt").write_text("_background_\nleaf\nstem\n")
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\nleaf:128,0,0::\nstem:0,128,0::\n")
    assert class_list(tmp_path, "voc").names == NAMES
    (tmp_path / "class_names.txt").write_text("_background_\nstem\nleaf\n")
    with pytest.raises(UserError, match="labelmap.txt and .*class_names.txt name different classes"):
        class_list(tmp_path, "voc")
    (tmp_path / "classes.json").write_text('["a", "b"]')
    assert class_list(tmp_path, "voc").names == ["a", "b"]
    assert class_list(tmp_path, "voc", ["c", "d"]).names == ["c", "d"]


@pytest.mark.parametrize(
    "name", ["ignore", "Void", "unlabeled", "Unlabelled", "_ignore_", "don't care", "IGNORE"]
)
def test_class_called_ignore_is_refused(tmp_path, name):
    (tmp_path / "classes.json").write_text(json.dumps(["road", name, "car"]))
    for given_ in ((), ("road", name, "car")):
        with pytest.raises(UserError) as error:
            class_list(tmp_path, "globs", given_)
        assert "--data.mask-map 0=0 1=ignore 2=1" in str(error.value) and "id 1" in str(error.value)
    assert class_list(tmp_path, "globs", ["road", "avoided", "ignored sign"]).names[2] == "ignored sign"


def own_voc(root, names=()):
    for i in range(3):
        for folder, mode in (("JPEGImages", "RGB"), ("SegmentationClass", "L")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new(mode, (6, 4), i).save(root / folder / f"{i}.png") if mode == "L" else Image.new(
                mode, (6, 4), (i,) * 3
            ).save(root / folder / f"{i}.jpg")
    return root


def test_own_data_in_voc_layout_causes_a_warning(tmp_path, capsys):
    root = own_voc(tmp_path / "data")
    made = index.prepare(root, tmp_path / "index", progress=False)
    assert len(made.classes) == 21 and any(
        "these masks hold ids up to 2; for your own data" in text for text in made.warnings
    )
    (root / "class_names.txt").write_text("_background_\nleaf\nstem\n")
    made = index.prepare(root, tmp_path / "index", progress=False)
    assert made.classes == ("_background_", "leaf", "stem") and not any(
        "your own data" in text for text in made.warnings
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([class_files.JSON, *class_files.TEXTS, *class_files.YAMLS]),
    text=st.text(st.sampled_from("ab0123:,=[]{}\"' \n#-namesid"), max_size=60) | st.text(max_size=30),
)
def test_any_text_is_a_class_list_or_refused_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        found = class_files.find(tmp_path)
        assert found is None or all(isinstance(one, str) and one.strip() for one in found[0])
    except UserError as error:
        assert "\n" not in str(error).strip() and name in str(error)
    finally:
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("data.yaml", "names:\n  0: a\n  1: b\n  1: c\n", "occurs twice"),
    ("classes.json", '{"0": "a", "1": "b", "1": "c"}', "'1' occurs twice"),
    ("labels.txt", "car,1\nvan,0\n", "names and numbers in an unknown order"),
    ("labels.txt", "name,id\ncar,0\nvan,1\n", "names and numbers in an unknown order"),
    ("labels.txt", "id name\n0 car\n1 van\n", "names and numbers in an unknown order"),
    ("data.yaml", "names: [a, b]\ndate: 2020-99-99\n", "is not YAML"),
    ("data.yaml", "names: [a, b]\nx: !!int abc\n", "is not YAML"),
])
def test_ambiguous_or_broken_lists_are_refused(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason):
        class_files.find(tmp_path)


def test_handwritten_numbers_as_keys_are_read(tmp_path):
    (tmp_path / "classes.json").write_text("{0: 'background', 1: 'leaf'}")
    assert class_files.find(tmp_path)[0] == ["background", "leaf"]
