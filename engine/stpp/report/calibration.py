"""Calibration plot: coverage against precision for rising confidence thresholds, as SVG."""

from pathlib import Path
from typing import NamedTuple

from stpp.errors import UserError
from stpp.inference import calibration
from stpp.inference.calibration import Calibration
from stpp.report.templates import template

WIDTH, HEIGHT = 420, 260
HUES = 360
GOLDEN_ANGLE = 137.508
"""Degrees between the hues of consecutive classes, which keeps neighbours distinct for any number."""


class Line(NamedTuple):
    """A polyline of the plot."""

    name: str
    colour: str
    points: str


class Figure(NamedTuple):
    """A calibration plot for the templates."""

    title: str
    width: int
    height: int
    least: float
    """Precision at the bottom of the chart."""
    lines: list[Line]
    """Lines of the classes, then of all pixels."""
    error: float
    accuracy: float
    images: int
    tta: str


def figure(measured: Calibration, *, title: str) -> Figure:
    """Plot of a calibration."""
    curves = [(name, measured.curve(i)) for i, name in enumerate(measured.classes)]
    curves = [(name, curve) for name, curve in [*curves, ("all", measured.curve())] if curve]
    least = min(precision for _, curve in curves for _, _, precision in curve)
    least = min(int(least * 10) / 10, 0.9)
    lines = []
    for number, (name, curve) in enumerate(curves):
        points = " ".join(f"{WIDTH * coverage:.1f},{HEIGHT * (1 - precision) / (1 - least):.1f}"
                          for _, coverage, precision in curve)
        hue = number * GOLDEN_ANGLE % HUES
        lines.append(Line(name, "#000" if name == "all" else f"hsl({hue:.0f} 70% 42%)", points))
    return Figure(title=title, width=WIDTH, height=HEIGHT, least=least, lines=lines, error=measured.error(),
                  accuracy=measured.accuracy(), images=measured.images, tta=measured.tta)


def plot(measured: Calibration, *, title: str) -> str:
    """Plot as SVG text."""
    return template("calibration.svg").render(figure=figure(measured, title=title))


def of_run(run: Path) -> list[Figure]:
    """Plots of the calibrations in a run's stages; damaged ones are skipped."""
    figures = []
    for path in sorted(run.glob(f"stages/*/{calibration.NAME}")):
        try:
            figures.append(figure(calibration.read(path), title=path.parent.name))
        except UserError:
            continue
    return figures
