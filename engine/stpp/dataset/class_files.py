"""Files that name the classes of a data set, as tools write them: `classes.json`, lists of names in text,
YOLO's `data.yaml`.

Read where the order of the ids is plain; anything else is refused, as a guess would swap classes.
"""

import json
import re
from pathlib import Path

from stpp import files
from stpp.errors import UserError

JSON = "classes.json"
TEXTS = ("labelmap.txt", "class_names.txt", "classes.txt", "obj.names")
YAMLS = ("data.yaml", "dataset.yaml")
_NUMBERED = re.compile(r"(\d{1,5})\s*[:=,;\t ]\s*(\S.*)")
_CVAT = re.compile(r"([^:]+):(?:\d+,\d+,\d+)?:[^:]*:[^:]*")
_WANTED = "write a list of names in the order of their ids"


def find(root: Path) -> tuple[list[str], str] | None:
    """(names, file) of `classes.json`, else of the other files in the root; None without any.

    Raises:
        UserError: a file that cannot be read as a class list, or two that name different classes.
    """
    if (root / JSON).is_file():
        return _json(root / JSON), str(root / JSON)
    found = [(_text(root / name), str(root / name)) for name in TEXTS if (root / name).is_file()]
    found += [(_yaml(root / name), str(root / name)) for name in YAMLS if (root / name).is_file()]
    for names, path in found[1:]:
        if [_bare(name) for name in names] != [_bare(name) for name in found[0][0]]:
            raise UserError(
                f"{found[0][1]} and {path} name different classes; give --data.classes, or {JSON}"
            )
    return found[0] if found else None


def _bare(name: str) -> str:
    """labelme writes `_background_` where others write `background`."""
    return name.strip("_ ").lower()


def _read(path: Path) -> str:
    try:
        return files.read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a class list ({error})") from error


def _json(path: Path) -> list[str]:
    """A list of names; an object with it under "classes" or "categories", names perhaps in objects with ids;
    or {id: name}, {name: id}."""
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: is not JSON ({' '.join(str(error).split())}); expected a list of class names"
        ) from error
    if isinstance(value, dict) and isinstance(
        listed := value.get("classes", value.get("categories")), (list, dict)
    ):
        value = listed
    if isinstance(value, dict) and value and all(type(one) is int for one in value.values()):
        return _ordered([(number, name) for name, number in value.items()], path)
    if isinstance(value, dict) and value and all(key.isascii() and key.isdecimal() for key in value):
        return _ordered([(int(key), name) for key, name in value.items()], path)
    if not isinstance(value, list):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    if value and all(isinstance(one, dict) for one in value):
        names = [one.get("name", one.get("title")) for one in value]
        ids = [one.get("id") for one in value]
        if any(number is not None for number in ids):
            return _ordered(list(zip(ids, names, strict=True)), path)
        value = names
    return _names(value, path)


def _text(path: Path) -> list[str]:
    """One name a line; or `id: name`; or CVAT's `name:r,g,b:parts:actions`. Lines that begin with # say
    nothing."""
    lines = [line.strip() for line in _read(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    cvat = [_CVAT.fullmatch(line) for line in lines]
    if lines and all(cvat):
        return _names([found[1].strip() for found in cvat], path)
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        return _ordered([(int(found[1]), found[2].strip()) for found in numbered], path)
    if any(numbered) and any(":" in line for line in lines):
        raise UserError(f"{path}: some lines are `id: name` and others are not; {_WANTED}, one a line")
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
            f"hold class ids "
            f"from 0; {_WANTED}, and turn the ids in the masks into these with --data.mask-map"
        )
    return _names([name for _, name in sorted(pairs, key=lambda pair: pair[0])], path)


def _names(values: list, path: Path) -> list[str]:
    if not all(isinstance(name, str) and name.strip() for name in values):
        raise UserError(f"{path}: expected a list of class names in the order of their ids")
    return values
