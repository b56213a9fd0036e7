"""Files that name the classes of a data set, as tools write them: `classes.json`, lists of names in text,
YOLO's `data.yaml`.

Read where the order of the ids is plain; anything else is refused, as a guess would swap classes.
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
_SEPARATOR, _NO_NAME = re.compile(r"[:=,;\t]"), re.compile(r"[{}\[\]<>:=;\t]")
"""Signs between an id and its name; signs of files that are written for programs."""
_WANTED = "write a list of names in the order of their ids"


def find(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of `classes.json`, else of the other files in the root; None without any.

    Raises:
        UserError: a file that cannot be read as a class list, or two that name different classes.
    """
    return of_json(root) or of_tools(root)


def of_json(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of `classes.json`; None without one."""
    return (_json(root / JSON), str(root / JSON)) if (root / JSON).is_file() else None


def of_tools(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of the other files; None without any."""
    found = [(_text(root / name), str(root / name)) for name in TEXTS if (root / name).is_file()]
    found += [(_yaml(root / name), str(root / name)) for name in YAMLS if (root / name).is_file()]
    for names, path in found[1:]:
        if [_bare(name) for name in names] != [_bare(name) for name in found[0][0]]:
            raise UserError(
                f"{found[0][1]} and {path} name different classes; give --data.classes, or {JSON}"
            )
    return found[0] if found else None


def _bare(name: str) -> str:
    """A name in lower case without signs around it: labelme writes `_background_` where others write
    `background`."""
    return name.strip("_ ").lower()


def _read(path: Path) -> str:
    try:
        return files.read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a class list ({error})") from error


def _json(path: Path) -> list[str]:
    """A list of names; an object with it under "classes", "categories" or "names", names perhaps in objects
    with ids; or {id: name}, {name: id}."""
    value = _parsed(_read(path), path)
    if isinstance(value, dict):
        lists = (value[name] for name in ("classes", "categories", "names") if name in value)
        value = next((listed for listed in lists if isinstance(listed, (list, dict))), value)
    if isinstance(value, dict) and value and all(type(one) is int for one in value.values()):
        return _ordered([(number, name) for name, number in value.items()], path)
    if isinstance(value, dict) and value and all(key.isascii() and key.isdecimal() for key in value):
        return _ordered([(int(key), name) for key, name in value.items()], path)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    if value and all(isinstance(one, dict) for one in value):
        names = [next((one[key] for key in ("name", "title", "label") if key in one), None) for one in value]
        ids = [one.get("id") for one in value]
        if any(number is not None for number in ids):
            return _ordered(list(zip(ids, names, strict=True)), path)
        value = names
    return _names(value, path)


def _parsed(text: str, path: Path) -> object:
    """JSON, or what people write for it by hand: single quotes, a comma behind the last name."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise UserError(
                f"{path}: is not JSON ({' '.join(str(error).split())}); "
                "write a list of class names in the order of "
                'their ids: ["background", "leaf"]'
            ) from error


def _text(path: Path) -> list[str]:
    """One name a line; or `id: name`, with a header perhaps; or CVAT's `name:r,g,b:parts:actions`. Lines that
    begin with # say nothing."""
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if labelled := cvat.parsed(lines):
        return _names([label.name for label in labelled], path)
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        return _ordered([(int(found[1]), found[2].strip()) for found in numbered], path)
    if len(lines) > 2 and not numbered[0] and all(numbered[1:]) and _SEPARATOR.search(lines[0]):
        return _ordered([(int(found[1]), found[2].strip()) for found in numbered[1:]], path)
    if any(found and _SEPARATOR.search(line) for found, line in zip(numbered, lines, strict=True)):
        raise UserError(f"{path}: some lines are `id: name` and others are not; {_WANTED}, one a line")
    if form := next((line for line in lines if _NO_NAME.search(line)), None):
        raise UserError(f"{path}: the line {form!r} is no class name; {_WANTED}, one a line")
    if lines[:1] == ["__ignore__"]:  # labelme's list gives it the id -1
        lines = lines[1:]
    return _names(lines, path)


def _yaml(path: Path) -> list[str]:
    """YOLO's: `names: [a, b]`, `names: {0: a}`, or a block of either."""
    import yaml

    try:
        value = yaml.safe_load(_read(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from error
    names = value.get("names") if isinstance(value, dict) else None
    if isinstance(names, dict):
        return _ordered(list(names.items()), path)
    if not isinstance(names, list):
        raise UserError(f"{path}: has no list `names`; {_WANTED} in {JSON}")
    return _names(names, path)


def _ordered(pairs: list[tuple[object, object]], path: Path) -> list[str]:
    """The names of (id, name) by their ids, which must be 0, 1, 2, ..."""
    ids = [number for number, _ in pairs]
    if any(type(number) is not int for number in ids) or sorted(ids) != list(range(len(pairs))):
        shown = ", ".join(str(number) for number in ids[:5])
        raise UserError(
            f"{path}: its ids ({shown}{', ...' * (len(ids) > 5)}) are not 0, 1, 2, ... once each, and masks "
            f"hold class ids from 0; {_WANTED}, and turn the ids in the masks into these with --data.mask-map"
        )
    return _names([name for _, name in sorted(pairs, key=lambda pair: pair[0])], path)


def _names(values: list, path: Path) -> list[str]:
    if not all(isinstance(name, str) and name.strip() for name in values):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    return [name.strip() for name in values]
