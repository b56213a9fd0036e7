"""Class-name files of annotation tools: `classes.json`, text lists, YOLO's `data.yaml`.

Only files with an unambiguous id order are accepted; a wrong guess would swap classes.
"""

import ast
import json
import re
from pathlib import Path

from stpp import files
from stpp.annotations import cvat
from stpp.errors import UserError

JSON = "classes.json"
TEXTS = ("labelmap.txt", "class_names.txt", "classes.txt", "labels.txt", "obj.names")
YAMLS = ("data.yaml", "dataset.yaml")
_NUMBERED = re.compile(r"(\d{1,5})\s*[:=,;\t ]\s*(\S.*)")
_NUMBER_LAST = re.compile(r".*[:=,;\t]\s*\d{1,5}")
_SEPARATOR, _NO_NAME = re.compile(r"[:=,;\t]"), re.compile(r"[{}\[\]<>:=;\t]")
"""Separators between an id and its name; characters that mark a line as code or markup."""
_WANTED = "write a list of names in the order of their ids"


def find(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of `classes.json`, otherwise of another class file in the root; None without any.

    Raises:
        UserError: an unreadable class list, or two files with different classes.
    """
    return from_json(root) or from_tools(root)


def from_json(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of `classes.json`; None without one."""
    return (_json(root / JSON), str(root / JSON)) if (root / JSON).is_file() else None


def from_tools(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of the annotation tools' class files; None without any."""
    found = [(_text(root / name), str(root / name)) for name in TEXTS if (root / name).is_file()]
    found += [(_yaml(root / name), str(root / name)) for name in YAMLS if (root / name).is_file()]
    for names, path in found[1:]:
        if [_bare(name) for name in names] != [_bare(name) for name in found[0][0]]:
            raise UserError(
                f"{found[0][1]} and {path} name different classes; give --data.classes, or {JSON}"
            )
    return found[0] if found else None


def _bare(name: str) -> str:
    """Lower-case name without surrounding signs: labelme writes `_background_` for `background`."""
    return name.strip("_ ").lower()


def _read(path: Path) -> str:
    try:
        return files.read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a class list ({error})") from error


def _json(path: Path) -> list[str]:
    """A list of names; an object that holds one under "classes", "categories" or "names", possibly as objects
    with ids; or {id: name}, {name: id}."""
    value = _parsed(_read(path), path)
    if isinstance(value, dict):
        lists = (value[name] for name in ("classes", "categories", "names") if name in value)
        value = next((listed for listed in lists if isinstance(listed, (list, dict))), value)
    if isinstance(value, dict) and value and all(type(number) is int for number in value.values()):
        return _ordered([(number, name) for name, number in value.items()], path)
    keys = list(map(str, value)) if isinstance(value, dict) else []
    if keys and all(key.isascii() and key.isdecimal() for key in keys):
        return _ordered([(int(key), name) for key, name in zip(keys, value.values(), strict=True)], path)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    if value and all(isinstance(entry, dict) for entry in value):
        names = [next((entry[key] for key in ("name", "title", "label") if key in entry), None)
                 for entry in value]
        ids = [entry.get("id") for entry in value]
        if any(number is not None for number in ids):
            return _ordered(list(zip(ids, names, strict=True)), path)
        value = names
    return _names(value, path)


def _parsed(text: str, path: Path) -> object:
    """JSON, or hand-written variants of it: single quotes, a trailing comma."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except _Repeated as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UserError(
                f"{path}: is not JSON ({' '.join(str(error).split())}); write a list of class names in the "
                'order of their ids: ["background", "leaf"]'
            ) from error


class _Repeated(ValueError):
    """A key occurs twice."""


def _refuse_repeated(keys: list) -> None:
    if repeated := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
        raise _Repeated(f"{repeated!r} occurs twice")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _text(path: Path) -> list[str]:
    """One name per line; or `id: name`, optionally with a header; or CVAT's `name:r,g,b:parts:actions`. Lines
    that begin with # are comments."""
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if labelled := cvat.parsed(lines):
        return _names([label.name for label in labelled], path)
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        return _ordered([(int(match[1]), match[2].strip()) for match in numbered], path)
    if len(lines) > 2 and not numbered[0] and all(numbered[1:]) and _SEPARATOR.search(lines[0]):
        return _ordered([(int(match[1]), match[2].strip()) for match in numbered[1:]], path)
    if any(match and _SEPARATOR.search(line) for match, line in zip(numbered, lines, strict=True)):
        raise UserError(f"{path}: some lines are `id: name` and others are not; {_WANTED}, one per line")
    if len(lines) > 2 and all(numbered[1:]) or any(map(_NUMBER_LAST.fullmatch, lines)):
        raise UserError(f"{path}: its lines hold names and numbers in an unknown order; {_WANTED}, one "
                        "per line")
    if form := next((line for line in lines if _NO_NAME.search(line)), None):
        raise UserError(f"{path}: the line {form!r} is not a class name; {_WANTED}, one per line")
    if lines[:1] == ["__ignore__"]:  # labelme's list gives it the id -1
        lines = lines[1:]
    return _names(lines, path)


def _yaml(path: Path) -> list[str]:
    """YOLO class names: `names: [a, b]`, `names: {0: a}`, or either as a block."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Loader that refuses repeated keys."""

        def construct_mapping(self, node, deep=False):
            _refuse_repeated([self.construct_object(key, deep=True) for key, _ in node.value
                              if not key.tag.endswith(":merge")])
            return super().construct_mapping(node, deep)

    try:
        value = yaml.load(_read(path), Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from error
    names = value.get("names") if isinstance(value, dict) else None
    if isinstance(names, dict):
        return _ordered(list(names.items()), path)
    if not isinstance(names, list):
        raise UserError(f"{path}: has no list `names`; {_WANTED} in {JSON}")
    return _names(names, path)


def _ordered(pairs: list[tuple[object, object]], path: Path) -> list[str]:
    """Names of (id, name) pairs sorted by id; ids must be 0, 1, 2, ..."""
    ids = [number for number, _ in pairs]
    if any(type(number) is not int for number in ids) or sorted(ids) != list(range(len(pairs))):
        shown = ", ".join(str(number) for number in ids[:5])
        raise UserError(
            f"{path}: its ids ({shown}{', ...' * (len(ids) > 5)}) are not 0, 1, 2, ... once each, as class "
            f"ids must be; {_WANTED}, and map the ids in the masks with --data.mask-map"
        )
    return _names([name for _, name in sorted(pairs, key=lambda pair: pair[0])], path)


def _names(values: list, path: Path) -> list[str]:
    if not all(isinstance(name, str) and name.strip() for name in values):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    return [name.strip() for name in values]
