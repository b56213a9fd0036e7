"""Shares of the classes among labelled and among pseudo-labelled pixels, and the lines about classes that go
missing."""

import math
from collections.abc import Mapping, Sequence

ABSENT = 0.1
"""A class is nearly absent where its share is less than this part of its share of the labelled pixels."""
REMEDIES = "--rare.weights inverse-sqrt, --rare.sampling 0.5, --rare.logit-adjustment 1"
"""What may help a class that is there and is not learned."""
GUIDE = "docs/rare-classes.md has what they do and cost"


def percent(pixels_C: Sequence[int]) -> list[float]:
    """Share of each class in percent; zeros where nothing was counted."""
    total = max(sum(pixels_C), 1)
    return [100 * count / total for count in pixels_C]


def ratios(labelled_C: Sequence[int], found_C: Sequence[int]) -> list[float]:
    """Share of each class among the found pixels over that among the labelled ones; NaN without a labelled
    pixel, or where nothing was found at all."""
    if not any(found_C):
        return [math.nan] * len(labelled_C)
    return [theirs / ours if ours else math.nan
            for ours, theirs in zip(percent(labelled_C), percent(found_C), strict=True)]


def by_name(classes: Sequence[str], labelled_C: Sequence[int], found_C: Sequence[int],
            found: str) -> dict[str, Mapping[str, float]]:
    """The columns of a row of the metrics: percent by class, and their ratio.

    Args:
        found: name of the found pixels: "pseudo" or "confident".
    """
    columns = {"labelled_pct": percent(labelled_C), f"{found}_pct": percent(found_C),
               f"{found}_ratio": ratios(labelled_C, found_C)}
    return {name: dict(zip(classes, values, strict=True)) for name, values in columns.items()}


def missing(classes: Sequence[str], labelled_C: Sequence[int], found_C: Sequence[int],
            what: str) -> dict[str, str]:
    """Lines about classes that are in the labels and nearly absent from what was found, by class.

    Args:
        what: the found pixels in words, "pseudo-labelled pixels".
    """
    lines = {}
    columns = zip(classes, percent(labelled_C), percent(found_C), ratios(labelled_C, found_C), strict=True)
    for name, ours, theirs, ratio in columns:
        if ratio < ABSENT:
            lines[name] = (f"class {name} has {ours:.3g} % of the labelled pixels and {theirs:.3g} % of the "
                           f"{what}, {ratio:.2g} times as much")
    return lines
