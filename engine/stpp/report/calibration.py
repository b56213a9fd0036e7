"""Drawing of a calibration: coverage against precision as the least confidence rises, as plain SVG."""

from pathlib import Path
from typing import NamedTuple

from stpp.errors import UserError
from stpp.inference import calibration
from stpp.inference.calibration import Calibration
from stpp.report.templates import template

WIDTH, HEIGHT = 420, 260
HUES = 360
GOLDEN_ANGLE = 137.508
"""Degrees between the hues of classes that follow each other: neighbours differ, however many there are."""


class Line(NamedTuple):
    """One polyline."""

    name: str
    colour: str
    points: str


class Figure(NamedTuple):
    """A calibration as the templates draw it."""

    title: str
    width: int
    height: int
    least: float
    """Precision at the foot of the chart."""
    lines: list[Line]
    """Of the classes, and that of all pixels at the end."""
    error: float
    accuracy: float
    images: int
    tta: str


def figure(found: Calibration, *, title: str) -> Figure:
    """The figure of a calibration."""
    curves = [(name, found.curve(i)) for i, name in enumerate(found.classes)] + [("all", found.curve())]
    curves = [(name, curve) for name, curve in curves if curve]
    least = min(precision for _, curve in curves for _, _, precision in curve)
    least = min(int(least * 10) / 10, 0.9)
    lines = []
    for number, (name, curve) in enumerate(curves):
        points = " ".join(f"{WIDTH * coverage:.1f},{HEIGHT * (1 - precision) / (1 - least):.1f}"
                          for _, coverage, precision in curve)
        hue = number * GOLDEN_ANGLE % HUES
        lines.append(Line(name, "#000" if name == "all" else f"hsl({hue:.0f} 70% 42%)", points))
    return Figure(title=title, width=WIDTH, height=HEIGHT, least=least, lines=lines, error=found.error(),
                  accuracy=found.accuracy(), images=found.images, tta=found.tta)


def plot(found: Calibration, *, title: str) -> str:
    """The figure as the text of an SVG file."""
    return template("calibration.svg").render(figure=figure(found, title=title))


def of_run(run: Path) -> list[Figure]:
    """The figures of the calibrations in a run's stages; damaged ones are left out."""
    found = []
    for path in sorted(run.glob(f"stages/*/{calibration.NAME}")):
        try:
            found.append(figure(calibration.read(path), title=path.parent.name))
        except UserError:
            continue
    return found
