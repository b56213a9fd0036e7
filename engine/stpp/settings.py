"""Settings: the fields of nested dataclasses, filled from plain values, and named where one does not fit.

A setting has one name everywhere: `train.crop_px` as a key, `--train.crop-px` as a flag. The types of the
fields are the rules: whole numbers, numbers, text, paths, switches, choices (Literal), lists (tuple), any of
these or None, and sections (dataclasses). What several fields must fulfil together, their dataclass checks in
`__post_init__`.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from stpp.errors import UserError

T = TypeVar("T")
INLINE = tyro.conf.arg(name="")
"""Marks a section (`Annotated[Section, INLINE]`) whose settings are named without its own name."""
_LONGEST = 80
"""Characters of a value that a message repeats."""
_WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}


class Unfit(ValueError):
    """A value that a setting cannot have."""


def known(cls: type, prefix: str = "") -> dict[str, Any]:
    """The settings of a dataclass: their types by their dotted keys."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        annotation, key = _bare(hint), prefix + name
        if dataclasses.is_dataclass(annotation):
            found.update(known(annotation, prefix if _is_marked(hint, INLINE) else f"{key}."))
        elif name in cls.__dataclass_fields__:
            found[key] = annotation
    return found


def flag(key: str) -> str:
    """The flag of a key: `train.crop_px` -> `--train.crop-px`."""
    return "--" + key.replace("_", "-")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted key: `{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def filled(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass whose fields all have defaults, with plain values (as of TOML or JSON) in their place.

    A value has the type of its field; a whole number serves for any number, numbers serve for text, text for
    a path.

    Raises:
        UserError: an unknown key, or a value that its field cannot have, in one line.
    """
    types, given = known(cls), {}
    for key, value in flatten(values).items():
        key = key.replace("-", "_")
        if key not in types:
            raise UserError(unknown(flag(key), types))
        if key in given:
            raise UserError(f"{flag(key)} is there twice, spelled with - and with _; keep one")
        try:
            given[key] = fitted(types[key], value)
        except Unfit:
            given_text = shown(json.dumps(value, default=str))
            raise UserError(f"{flag(key)} is {given_text}: it must be {allowed(types[key])}") from None
    return _replaced(cls(), given, "")


def _replaced(old: T, given: Mapping[str, Any], prefix: str) -> T:
    """`old` with the given values, sections first."""
    changes, hints = {}, get_type_hints(type(old), include_extras=True)
    for field in dataclasses.fields(old):
        key, value = prefix + field.name, getattr(old, field.name)
        if dataclasses.is_dataclass(value):
            is_inline = _is_marked(hints[field.name], INLINE)
            changes[field.name] = _replaced(value, given, prefix if is_inline else f"{key}.")
        elif key in given:
            changes[field.name] = given[key]
    return dataclasses.replace(old, **changes)


def fitted(annotation: Any, value: Any) -> Any:
    """The value of a field of this type that a plain value stands for.

    Raises:
        Unfit: it stands for none.
    """
    choices = _choices(annotation)
    if NoneType in choices and value in (None, "None"):  # flags have no other word for it
        return None
    for choice in choices:
        with contextlib.suppress(Unfit):
            return _fitted(choice, value)
    raise Unfit


def _fitted(annotation: Any, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if get_origin(annotation) is Literal:
        for option in get_args(annotation):
            if type(option) is type(value) and option == value:
                return option
    elif get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        items = _items(annotation, len(value))
        return tuple(fitted(item, one) for item, one in zip(items, value, strict=True))
    elif annotation is float and is_number:
        with contextlib.suppress(OverflowError):
            return float(value)
    elif annotation is int and type(value) is int or annotation is bool and type(value) is bool:
        return value
    elif annotation is str and (is_number or isinstance(value, str)):
        return str(value)
    elif annotation is Path and isinstance(value, str):
        return Path(value)
    raise Unfit


def _bare(annotation: Any) -> Any:
    """A type without what tyro is told of it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_marked(annotation: Any, marker: Any) -> bool:
    return get_origin(annotation) is Annotated and marker in get_args(annotation)[1:]


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; else the one type."""
    is_plain = get_origin(annotation) in (None, Literal, tuple)
    return (annotation,) if is_plain else get_args(annotation)


def _items(annotation: Any, count: int) -> tuple[Any, ...]:
    """The types of a tuple's items.

    Raises:
        Unfit: a tuple of this type does not have so many.
    """
    items = get_args(annotation)
    if len(items) == 2 and items[1] is Ellipsis:
        return items[:1] * count
    if len(items) != count:
        raise Unfit
    return items


def allowed(annotation: Any) -> str:
    """The values that a field of this type may have, in words."""
    words = []
    for choice in _choices(annotation):
        if get_origin(choice) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(choice))))
        elif get_origin(choice) is tuple:
            items = get_args(choice)
            words.append(f"a list, each {allowed(items[0])}" if items[-1] is Ellipsis
                         else f"{len(items)} values, each {allowed(items[0])}")
        elif choice is not NoneType:
            words.append(_WORDS[choice])
    return " or ".join(words)


def shown(text: str) -> str:
    """A text in one short line."""
    text = text if text and text.isprintable() else json.dumps(text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def unknown(given: str, types: Mapping[str, Any]) -> str:
    """The line about a flag that does not exist."""
    flags = {flag(key): key for key in types}
    inside = next((name for name in flags if name.startswith(given + ".")), None)
    if inside:
        return f"{shown(given)} is a section, not a setting; set what is in it, such as {inside}"
    near = difflib.get_close_matches(given, flags, n=2)
    hint = f"; perhaps you meant {' or '.join(near)}" if near else ""
    return f"there is no setting {shown(given)}{hint}"


def mistake(cls: type, args: Sequence[str]) -> str:
    """The line about arguments that tyro refuses; tyro itself says it in a box of many lines."""
    types = {flag(key): annotation for key, annotation in known(cls).items()}
    switches = {_opposite(name): name for name, annotation in types.items() if annotation is bool}
    hints = get_type_hints(cls, include_extras=True)
    positional = next((flag(key) for key in hints if _is_marked(hints[key], tyro.conf.Positional)), None)
    named, loose = set(), []
    for name, values, is_joined in _grouped(args):
        name = switches.get(name, name)
        if name and name not in types:
            return unknown(name, known(cls))
        taken = _taken(types[name], values) if name else 0
        if name and not _accepts(types[name], values[:taken]):
            if not taken:
                return f"{name} needs a value"
            return f"{name} is {shown(' '.join(values[:taken]))}: it must be {allowed(types[name])}"
        if name and types[name] is bool and values and (is_joined or not positional):
            return f"{name} takes no value such as {shown(values[0])}: it is on; {_opposite(name)} is off"
        named.add(name)
        if values[taken:]:
            loose.append(values[taken:])
    dashed = next((value for value in itertools.chain(*loose) if re.match(r"-\D", value)), None)
    if dashed:
        return unknown(dashed, known(cls))
    if positional and loose:  # those that stand together, once
        named.add(positional)
        loose[0] = loose[0][_taken(types[positional], loose[0]):]
    if rest := [*itertools.chain(*loose)]:
        return f"{shown(rest[0])} belongs to no flag"
    required = [flag(field.name) for field in dataclasses.fields(cls)
                if field.default is field.default_factory is dataclasses.MISSING]
    missing = [name[2:].upper() if name == positional else name for name in required if name not in named]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return "these arguments are not understood: --help lists the flags"


def _grouped(args: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """The arguments before the first flag, under "", and then each flag with those behind it; whether the
    first of them is joined to it, as in `--flag=VALUE`."""
    name, values, is_joined = "", [], False
    for arg in args:
        if arg.startswith("--"):
            yield name, values, is_joined
            name, joint, value = arg.partition("=")
            name, is_joined = name.replace("_", "-"), bool(joint)
            values = [value] if is_joined else []
        else:
            values.append(arg)
    yield name, values, is_joined


def _taken(annotation: Any, values: Sequence[str]) -> int:
    """Arguments that belong to a flag of this type, of those that stand behind it."""
    for choice in _choices(annotation):
        if get_origin(choice) is tuple:
            items = get_args(choice)
            return len(values) if items[-1] is Ellipsis else min(len(items), len(values))
    return 0 if annotation is bool else min(1, len(values))


def _accepts(annotation: Any, values: Sequence[str]) -> bool:
    if annotation is bool:
        return True
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            tyro.cli(annotation, args=list(values), add_help=False)
        except SystemExit:
            return False
    return True


def _opposite(switch: str) -> str:
    """The flag that turns a switch off: `--data.exif` -> `--data.no-exif`."""
    section, dot, name = switch[2:].rpartition(".")
    return f"--{section}{dot}no-{name}"
