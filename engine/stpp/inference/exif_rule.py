"""The EXIF rule that a network was trained with: its images turned upright, or as they are stored.

A checkpoint tells its rule, so that whoever uses it shows it the pictures it knows, and its masks fit the
data set.
"""

from collections.abc import Sequence
from pathlib import Path

from stpp import checkpoint
from stpp.errors import UserError
from stpp.inference.record import WEIGHTS


def told(path: Path) -> bool | None:
    """The rule that a checkpoint, or the one in an engine folder, tells: True for upright; None where it
    tells none.

    Raises:
        UserError: the file cannot be read as a checkpoint.
    """
    path = path / WEIGHTS if path.is_dir() else path
    if not path.exists():
        return None  # whoever opens it says so
    content = checkpoint.peek(path)
    reading = content.get("reading") if isinstance(content, dict) else None
    exif = reading.get("exif") if isinstance(reading, dict) else None
    return exif if isinstance(exif, bool) else None


def agreed(paths: Sequence[Path], asked: bool | None = None) -> bool:
    """The rule of networks that are used together; upright where neither they nor a flag tell one, as
    published ones do not.

    Args:
        asked: by `--exif` (True) or `--no-exif` (False); None: by neither.

    Raises:
        UserError: a network tells another rule than the flag or another network.
    """
    rules = {path: told(path) for path in paths}
    known = {path: rule for path, rule in rules.items() if rule is not None}
    for path, rule in known.items():
        if asked not in (None, rule):
            raise UserError(
                f"--{'exif' if asked else 'no-exif'}: {path} was trained on images {described(rule)} and tells so; "
                "leave the flag out"
            )
        first, expected = next(iter(known.items()))
        if rule != expected:
            raise UserError(
                f"{path} was trained on images {described(rule)}, {first} on images {described(expected)}; "
                "give checkpoints of one run"
            )
    return asked if asked is not None else next(iter(known.values()), True)


def described(exif: bool) -> str:
    """A rule in words that follow "images"."""
    return "turned upright" if exif else "as they are stored (--data.no-exif)"
