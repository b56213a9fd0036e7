"""JSON read element by element: the elements of the whole file, in little memory, and one line for a broken
file."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stpp.annotations import json_stream
from stpp.errors import UserError

RELAXED = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@RELAXED
@given(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=5),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
    st.sampled_from([1, 7, 1 << 20]),
    st.booleans(),
)
def test_elements_are_those_of_the_whole_file(tmp_path, value, indent, ascii_only, block, mark):
    path = tmp_path / "a.json"
    data = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + data)
    before = json_stream.BLOCK_BYTES
    try:
        json_stream.BLOCK_BYTES = block
        found = list(json_stream.elements(path))
    finally:
        json_stream.BLOCK_BYTES = before
    expected = [
        (name, one) for name, members in value.items() if isinstance(members, list) for one in members
    ]
    held = path.read_bytes()
    assert [json.loads(held[one.offset : one.offset + one.bytes]) for one in found] == [
        one for _, one in expected
    ]
    assert [(one.name, one.value) for one in found] == [(name, value) for name, value in expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"a"',
        '{"a" 1}',
        '{"a": [1',
        '{"a": [1 2]}',
        '{"a": [1,]}x',
        '{"a": [nope]}',
        '{"a": "b',
        "3",
        '{"a": [1], "b": [' + "[" * 100_000 + "]}",
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: .* at byte \d+") as refused:
        list(json_stream.elements(tmp_path / "a.json"))
    assert "\n" not in str(refused.value)


def test_elements_may_be_large_but_not_unlimited(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", 1 << 12)
    (tmp_path / "a.json").write_text(json.dumps({"a": ["x" * 300_000]}))
    assert [one.bytes for one in json_stream.elements(tmp_path / "a.json")] == [300_002]
    (tmp_path / "a.json").write_text(json.dumps({"a": ["x" * 5_000_000]}))
    with pytest.raises(UserError, match="exceeds 1 MiB"):
        list(json_stream.elements(tmp_path / "a.json"))


def test_memory_does_not_grow_with_the_file(tmp_path):
    one = json.dumps({"id": 1, "points": list(range(100))})
    (tmp_path / "a.json").write_text('{"a": [' + ",\n".join([one] * 30_000) + "]}")
    tracemalloc.start()
    assert sum(1 for _ in json_stream.elements(tmp_path / "a.json")) == 30_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.json").stat().st_size > 12e6 and peak < 8e6


@pytest.mark.parametrize("gap", range(5))
def test_number_split_between_blocks_is_read(tmp_path, monkeypatch, gap):
    monkeypatch.setattr(json_stream, "BLOCK_BYTES", 16)
    (tmp_path / "a.json").write_text('{"a": [' + " " * (6 + gap) + "0.5, 1e-3, 25]}")
    assert [element.value for element in json_stream.elements(tmp_path / "a.json")] == [0.5, 1e-3, 25]


@pytest.mark.parametrize(("text", "reason"), [
    ('{"a": []}{"b": []}', "something follows"), ('{"a": []} x', "something follows"),
    ('{["a"]: [1]}', "a key is not a string"), ('{"a": ["c\\ud83d"]}', "half of a surrogate pair"),
])
def test_more_than_an_object_and_odd_text_are_refused(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        list(json_stream.elements(tmp_path / "a.json"))
