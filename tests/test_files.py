"""One module opens files for writing, and its files are complete at every point where a process may die."""

import ast
import errno
import json
import os
from pathlib import Path

import pytest

from stpp import files

ENGINE = Path(__file__).parents[1] / "engine" / "stpp"
WRITERS = {"write_text", "write_bytes"}
SYSTEM = {("os", name) for name in ("open", "fdopen", "mkfifo")}


def opened_for_writing(text: str) -> list[str]:
    """Finds calls of a source that open a file for writing other than through `files`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or (node.args and ast.unparse(node.args[0]) == "os.devnull"):
            continue
        function = node.func
        owner = (
            function.value.id
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
            else ""
        )
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        modes = [one.value for one in (*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode"))
                 if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        writes = any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
        if (name == "open" and owner not in ("files", "os") and writes) or (owner, name) in SYSTEM or (
                name in WRITERS and owner != "files"):
            found.append(f"line {node.lineno}: {ast.unparse(function)}")
    return found


def test_write_reader_finds_every_kind():
    text = (
        'open(p, "w")\nopen(p)\nopen(p, mode="ab")\np.open("x")\np.write_text(t)\n'
        'files.write_text(p, t)\nos.open(p, 1)\n'
        'Image.open(p)\nopen(p, "rb")\ntarfile.open(p, "r:")\n'
    )
    assert opened_for_writing(text) == ["line 1: open", "line 3: open", "line 4: p.open",
                                        "line 5: p.write_text",
                                        "line 7: os.open"]


def test_engine_opens_files_for_writing_in_one_module_only():
    wrong = [f"{path.relative_to(ENGINE)} {call}" for path in sorted(ENGINE.rglob("*.py"))
             if path.name != "files.py"
             for call in opened_for_writing(path.read_text(encoding="utf-8"))]
    assert wrong == []


COMMITS = ("fsync", "replace")


def points(write) -> list[str]:
    """Lists the calls of `write` that make something permanent, in order."""
    return _trace(write, -1)


def _trace(write, fail_at: int) -> list[str]:
    seen, real = [], {name: getattr(os, name) for name in COMMITS}

    def traced(name):
        def call(*args, **kwargs):
            if len(seen) == fail_at:
                raise Died
            seen.append(name)
            return real[name](*args, **kwargs)
        return call

    for name in COMMITS:
        setattr(os, name, traced(name))
    try:
        write()
    except Died:
        pass
    finally:
        for name in COMMITS:
            setattr(os, name, real[name])
    return seen


class Died(BaseException):
    """Raised to end the process at one point."""


def test_file_is_old_or_new_at_every_point(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, "old")
    calls = points(lambda: files.write_json(path, "old"))
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    for number, call in enumerate(calls):
        files.write_json(path, "old")
        _trace(lambda: files.write_json(path, "new"), number)
        assert json.loads(path.read_text()) == ("old" if number <= calls.index("replace") else "new"), call
        assert [entry.name for entry in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(),
                                   SystemExit(143)])
def test_failed_write_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "value"
    files.write_text(path, "old")
    with pytest.raises(type(error)), files.atomic(path, "w") as file:
        file.write("new")
        raise error
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_error_names_the_file_instead_of_the_temporary_one(tmp_path):
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(OSError) as caught:
        files.write_json(tmp_path / "missing" / ("x" * 300), {})
    assert ".tmp" not in str(caught.value.filename)
    with pytest.raises(OSError) as caught:
        files.write_json(tmp_path / "scores.json", {})
    assert caught.value.filename == str(tmp_path / "scores.json")


def test_file_created_once_is_not_replaced(tmp_path):
    path = tmp_path / "below" / "key"
    files.create_once(path, b"first")
    files.create_once(path, b"second")
    assert path.read_bytes() == b"first" and path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]


def test_renamed_file_is_complete_or_absent(tmp_path):
    with files.renamed(tmp_path / "mask", tmp_path / "t") as file:
        file.write(b"whole")
    with pytest.raises(RuntimeError), files.renamed(tmp_path / "other", tmp_path / "t") as file:
        file.write(b"half")
        raise RuntimeError
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"mask": b"whole"}
