"""EXIF rule of a network's training images: turned upright, or as stored.

A checkpoint records its rule, so that inference reads images as training did, and masks fit the data set.
"""

from collections.abc import Sequence
from pathlib import Path

from stpp import checkpoint, files
from stpp.errors import UserError
from stpp.inference.record import WEIGHTS


def recorded(path: Path) -> bool | None:
    """Reads the rule recorded in a checkpoint, or in an engine folder's: True for upright; None if not
    recorded.

    Raises:
        UserError: the file cannot be read as a checkpoint.
    """
    path = path / WEIGHTS if path.is_dir() else files.and_part(path)[0]
    if not path.exists():
        return None  # the code that opens the checkpoint reports it
    content = checkpoint.peek(path)
    reading = content.get("reading") if isinstance(content, dict) else None
    exif = reading.get("exif") if isinstance(reading, dict) else None
    return exif if isinstance(exif, bool) else None


def resolve(paths: Sequence[Path], requested: bool | None = None) -> bool:
    """Determines the common rule of networks; upright if neither a network nor a flag sets one (published
    networks record none).

    Args:
        requested: True for `--exif`, False for `--no-exif`, None for neither.

    Raises:
        UserError: a network's rule differs from the flag or from another network's.
    """
    rules = {path: recorded(path) for path in paths}
    known = {path: rule for path, rule in rules.items() if rule is not None}
    for path, rule in known.items():
        if requested not in (None, rule):
            raise UserError(
                f"--{'exif' if requested else 'no-exif'}: {path} was trained on images {describe(rule)}; "
                "leave the flag out"
            )
        first, expected = next(iter(known.items()))
        if rule != expected:
            raise UserError(
                f"{path} was trained on images {describe(rule)}, {first} on images {describe(expected)}; "
                "give checkpoints of one run"
            )
    return requested if requested is not None else next(iter(known.values()), True)


def describe(exif: bool) -> str:
    """Describes a rule, in words that follow "images"."""
    return "turned upright" if exif else "as they are stored (--data.no-exif)"
