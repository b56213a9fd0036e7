"""Per-class settings, written as CLASS=NUMBER for the classes that differ from the default."""

from collections.abc import Sequence

from stpp.errors import UserError


def check(pairs: Sequence[str], name: str) -> None:
    """Validates the syntax of CLASS=CONFIDENCE pairs, before the class names are known.

    Args:
        name: setting name for messages, such as `label.class-confidence`.

    Raises:
        UserError: malformed pair, a confidence outside [0, 1), or a repeated class.
    """
    _parsed(pairs, name)


def filled(pairs: Sequence[str], name: str, classes: Sequence[str],
           default: float | Sequence[float]) -> tuple[float, ...]:
    """Confidence of every class, ordered by class id.

    Args:
        default: confidence of classes without a pair: one value for all, or one per class.

    Raises:
        UserError: as `check`, or an unknown class.
    """
    confidences = _parsed(pairs, name)
    if unknown := [class_name for class_name in confidences if class_name not in classes]:
        raise UserError(f"--{name}: unknown class {unknown[0]}; the classes are {', '.join(classes)}")
    defaults = default if isinstance(default, Sequence) else [default] * len(classes)
    return tuple(confidences.get(class_name, value)
                 for class_name, value in zip(classes, defaults, strict=True))


def _parsed(pairs: Sequence[str], name: str) -> dict[str, float]:
    confidences: dict[str, float] = {}
    for pair in pairs:
        class_name, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not class_name or not 0 <= value < 1:
            raise UserError(f"--{name} is {pair}: it must be CLASS=CONFIDENCE with a confidence from 0 to "
                            "below 1, for example pole=0.6")
        if class_name in confidences:
            raise UserError(f"--{name} names {class_name} twice; keep one")
        confidences[class_name] = value
    return confidences
