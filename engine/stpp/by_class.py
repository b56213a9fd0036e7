"""Settings by class: numbers written as CLASS=NUMBER, for the classes that differ from the others."""

from collections.abc import Sequence

from stpp.errors import UserError


def check(pairs: Sequence[str], name: str) -> None:
    """Refuses what is not CLASS=CONFIDENCE; whether the classes exist, nobody knows yet.

    Args:
        name: of the setting, `label.class-confidence`.

    Raises:
        UserError: a pair that is none, a number below 0 or from 1 on, a class that is there twice.
    """
    _parsed(pairs, name)


def filled(pairs: Sequence[str], name: str, classes: Sequence[str],
           default: float | Sequence[float]) -> tuple[float, ...]:
    """The confidence of every class, in the order of their ids.

    Args:
        default: of the classes that are not named: one for all, or one each.

    Raises:
        UserError: as `check`, or a class that does not exist.
    """
    given = _parsed(pairs, name)
    if unknown := [one for one in given if one not in classes]:
        raise UserError(f"--{name} names {unknown[0]}, which is no class; the classes are "
                        f"{', '.join(classes)}")
    others = default if isinstance(default, Sequence) else [default] * len(classes)
    return tuple(given.get(one, other) for one, other in zip(classes, others, strict=True))


def _parsed(pairs: Sequence[str], name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        one, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not one or not 0 <= value < 1:
            raise UserError(f"--{name} is {pair}: it must be CLASS=CONFIDENCE with a confidence from 0 to "
                            "below 1, for example pole=0.6")
        if one in found:
            raise UserError(f"--{name} names {one} twice; keep one")
        found[one] = value
    return found
