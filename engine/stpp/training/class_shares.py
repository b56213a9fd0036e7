"""Class shares among labelled and pseudo-labelled pixels, and warnings about missing classes."""

import math
from collections.abc import Mapping, Sequence

ABSENT = 0.1
"""Ratio of a class's share to its share of the labelled pixels, below which it is nearly absent."""
REMEDIES = "--rare.sampling 0.25, --rare.weights effective --rare.effective-pixels 1e4"
"""Remedies for a class that is labelled but not learned."""
GUIDE = "docs/rare-classes.md describes their effects and costs"


def percent(pixels_C: Sequence[int]) -> list[float]:
    """Computes the share of each class in percent; zeros if there are no pixels."""
    total = max(sum(pixels_C), 1)
    return [100 * count / total for count in pixels_C]


def ratios(labelled_C: Sequence[int], pseudo_C: Sequence[int]) -> list[float]:
    """Computes the ratio of each class's share of pseudo-labelled pixels to its share of labelled ones; NaN
    without a labelled pixel of the class."""
    return [pseudo / labelled if labelled else math.nan
            for labelled, pseudo in zip(percent(labelled_C), percent(pseudo_C), strict=True)]


def by_name(classes: Sequence[str], labelled_C: Sequence[int], pseudo_C: Sequence[int],
            kind: str) -> dict[str, Mapping[str, float]]:
    """Makes the columns of a metrics row: percent by class, and their ratio.

    Args:
        kind: kind of pseudo-labelled pixels, "pseudo" or "confident", for the column names.
    """
    columns = {"labelled_pct": percent(labelled_C), f"{kind}_pct": percent(pseudo_C),
               f"{kind}_ratio": ratios(labelled_C, pseudo_C)}
    return {name: dict(zip(classes, values, strict=True)) for name, values in columns.items()}


def missing(classes: Sequence[str], labelled_C: Sequence[int], pseudo_C: Sequence[int],
            what: str) -> dict[str, str]:
    """Makes warnings, by class, about classes that are labelled but nearly absent from pseudo labels.

    Args:
        what: name of the pseudo-labelled pixels, for example "confident pixels of this epoch".
    """
    if not any(pseudo_C):
        return {name: f"there are no {what}, of any class"
                for name, count in zip(classes, labelled_C, strict=True) if count}
    lines = {}
    columns = zip(classes, percent(labelled_C), percent(pseudo_C), ratios(labelled_C, pseudo_C), strict=True)
    for name, labelled, pseudo, ratio in columns:
        if ratio < ABSENT:
            lines[name] = (f"class {name} has {labelled:.3g} % of the labelled pixels and {pseudo:.3g} % of "
                           f"the {what}, {ratio:.2g} times as much")
    return lines
