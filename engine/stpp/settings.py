"""Settings: fields of nested dataclasses, filled from plain values, with one-line messages for values that do
not fit.

A setting has one name everywhere: `train.crop_px` as a key, `--train.crop-px` as a flag. Field types are the
rules: integers, numbers, text, paths, switches, choices (Literal), lists (tuple), any of these or None, and
sections (dataclasses). Constraints across fields are checked in the dataclass's `__post_init__`.
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
"""Marks a section (`Annotated[Section, INLINE]`) whose settings omit the section's name."""
_LONGEST = 80
"""Characters of a value that a message quotes."""
_WORDS = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}


class InvalidValue(ValueError):
    """A value that does not fit the type of its setting."""


def setting_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Types of a dataclass's settings by their dotted keys."""
    types = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        annotation, key = _bare(hint), prefix + name
        if dataclasses.is_dataclass(annotation):
            types.update(setting_types(annotation, prefix if _is_marked(hint, INLINE) else f"{key}."))
        elif name in cls.__dataclass_fields__:
            types[key] = annotation
    return types


def flag(key: str) -> str:
    """Flag of a key: `train.crop_px` -> `--train.crop-px`."""
    return "--" + key.replace("_", "-")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key: `{"train": {"lr": 1}}` -> `{"train.lr": 1}`."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def from_values(cls: type[T], values: Mapping[str, Any]) -> T:
    """Returns a dataclass with all defaults, overridden by plain values (as read from TOML or JSON).

    Values must have the type of their field; an integer is accepted for any number, numbers for text, text
    for paths.

    Raises:
        UserError: unknown key, or a value that does not fit its field; one line.
    """
    types, overrides = setting_types(cls), {}
    for key, value in flatten(values).items():
        key = key.replace("-", "_")
        if key not in types:
            raise UserError(unknown_flag(flag(key), types))
        if key in overrides:
            raise UserError(f"{flag(key)} is set twice, spelled with - and with _; keep one")
        try:
            overrides[key] = converted(types[key], value)
        except InvalidValue:
            value_text = shortened(json.dumps(value, default=str))
            raise UserError(f"{flag(key)} is {value_text}: it must be {allowed_values(types[key])}") from None
    return _replaced(cls(), overrides, "")


def _replaced(defaults: T, overrides: Mapping[str, Any], prefix: str) -> T:
    """`defaults` with overrides applied, sections first."""
    changes, hints = {}, get_type_hints(type(defaults), include_extras=True)
    for field in dataclasses.fields(defaults):
        key, value = prefix + field.name, getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            is_inline = _is_marked(hints[field.name], INLINE)
            changes[field.name] = _replaced(value, overrides, prefix if is_inline else f"{key}.")
        elif key in overrides:
            changes[field.name] = overrides[key]
    return dataclasses.replace(defaults, **changes)


def converted(annotation: Any, value: Any) -> Any:
    """Converts a plain value to the type of a field.

    Raises:
        InvalidValue: no type of the field accepts the value.
    """
    choices = _choices(annotation)
    if NoneType in choices and value in (None, "None"):  # the only spelling in flags
        return None
    for choice in choices:
        with contextlib.suppress(InvalidValue):
            return _converted(choice, value)
    raise InvalidValue


def _converted(annotation: Any, value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if get_origin(annotation) is Literal:
        for option in get_args(annotation):
            if type(option) is type(value) and option == value:
                return option
    elif get_origin(annotation) is tuple and isinstance(value, (list, tuple)):
        items = _items(annotation, len(value))
        return tuple(converted(item, part) for item, part in zip(items, value, strict=True))
    elif annotation is float and is_number:
        with contextlib.suppress(OverflowError):
            return float(value)
    elif annotation is int and type(value) is int or annotation is bool and type(value) is bool:
        return value
    elif annotation is str and (is_number or isinstance(value, str)):
        return str(value)
    elif annotation is Path and isinstance(value, str):
        return expanded(Path(value))
    raise InvalidValue


def expanded(value: Any) -> Any:
    """Replaces a leading `~` by the home folder in all paths of a value, a tuple or a dataclass: shells leave
    it in `--out=~/runs`."""
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):  # no such user
            return value.expanduser()
    elif isinstance(value, tuple):
        return tuple(map(expanded, value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        changes = {name: new for name, old in fields.items() if (new := expanded(old)) != old}
        return dataclasses.replace(value, **changes) if changes else value
    return value


def _bare(annotation: Any) -> Any:
    """The type without tyro's annotations."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_marked(annotation: Any, marker: Any) -> bool:
    return get_origin(annotation) is Annotated and marker in get_args(annotation)[1:]


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; otherwise the type itself."""
    is_plain = get_origin(annotation) in (None, Literal, tuple)
    return (annotation,) if is_plain else get_args(annotation)


def _items(annotation: Any, count: int) -> tuple[Any, ...]:
    """Item types of a tuple with `count` items.

    Raises:
        InvalidValue: the tuple type does not allow that many items.
    """
    items = get_args(annotation)
    if len(items) == 2 and items[1] is Ellipsis:
        return items[:1] * count
    if len(items) != count:
        raise InvalidValue
    return items


def allowed_values(annotation: Any) -> str:
    """Description of the values that a field of this type accepts."""
    words = []
    for choice in _choices(annotation):
        if get_origin(choice) is Literal:
            words.append("one of " + ", ".join(map(str, get_args(choice))))
        elif get_origin(choice) is tuple:
            items = get_args(choice)
            words.append(f"a list, each {allowed_values(items[0])}" if items[-1] is Ellipsis
                         else f"{len(items)} values, each {allowed_values(items[0])}")
        elif choice is not NoneType:
            words.append(_WORDS[choice])
    return " or ".join(words)


def shortened(text: str) -> str:
    """The text on one line, quoted if unprintable and shortened if long."""
    text = text if text and text.isprintable() else json.dumps(text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def unknown_flag(name: str, types: Mapping[str, Any]) -> str:
    """Error message for a flag that does not exist."""
    flags = {flag(key): key for key in types}
    inside = next((other for other in flags if other.startswith(f"{name}.")), None)
    if inside:
        return f"{shortened(name)} is a section, not a setting; use a setting in it, such as {inside}"
    near = difflib.get_close_matches(name, flags, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no setting {shortened(name)}{hint}"


def argument_error(cls: type, args: Sequence[str]) -> str:
    """Error line for arguments that tyro rejects; tyro's own message is a box of many lines."""
    types = {flag(key): annotation for key, annotation in setting_types(cls).items()}
    switches = {_opposite(name): name for name, annotation in types.items() if annotation is bool}
    hints = get_type_hints(cls, include_extras=True)
    positional = next((flag(key) for key in hints if _is_marked(hints[key], tyro.conf.Positional)), None)
    named, loose = set(), []
    for name, values, is_joined in _grouped(args):
        name = switches.get(name, name)
        if name and name not in types:
            return unknown_flag(name, setting_types(cls))
        taken = _taken(types[name], values) if name else 0
        if name and not _accepts(types[name], values[:taken]):
            if not taken:
                return f"{name} needs a value"
            value = shortened(" ".join(values[:taken]))
            return f"{name} is {value}: it must be {allowed_values(types[name])}"
        if name and types[name] is bool and values and (is_joined or not positional):
            return f"{name} takes no value, got {shortened(values[0])}; {_opposite(name)} turns it off"
        named.add(name)
        if values[taken:]:
            loose.append(values[taken:])
    dashed = next((value for value in itertools.chain(*loose) if re.match(r"-\D", value)), None)
    if dashed:
        return unknown_flag(dashed, setting_types(cls))
    if positional and loose:  # one group of adjacent arguments
        named.add(positional)
        loose[0] = loose[0][_taken(types[positional], loose[0]):]
    if rest := [*itertools.chain(*loose)]:
        return f"{shortened(rest[0])} does not belong to any flag"
    required = [flag(field.name) for field in dataclasses.fields(cls)
                if field.default is field.default_factory is dataclasses.MISSING]
    missing = [name[2:].upper() if name == positional else name for name in required if name not in named]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return "cannot parse these arguments; --help lists the flags"


def _grouped(args: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Groups arguments as (flag, values, True if joined as `--flag=VALUE`); those before the first flag come
    under ""."""
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
    """Number of the values after a flag that belong to it, given its type."""
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
    """Flag that turns a switch off: `--data.exif` -> `--data.no-exif`."""
    section, dot, name = switch[2:].rpartition(".")
    return f"--{section}{dot}no-{name}"
