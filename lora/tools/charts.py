"""Line and bubble charts as SVG: positions are computed here, and templates/chart.svg draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import itertools
import math

from markupsafe import Markup

from lora.evaluation.pages import render_template

Point = tuple[float, ...]  # (x, y), or (x, y, share): a circle of that share of an area

# Edges of the plotting area; the drawing is 440 wide and 260 high.
LEFT, RIGHT, TOP, BOTTOM = 56, 428, 36, 220
MAX_POINTS_PER_CURVE = 400
MAX_POINTS_WITH_CIRCLES = 30  # a curve with as many points or more is drawn as a line only
MAX_TICKS = 7
COLOURS = ("--a", "--b")  # variables of the page's style, the last curve's first
LEGEND_WIDTH_PER_CHARACTER = 8
LEGEND_GAP = 14


@dataclass(frozen=True)
class Scale:
    """A linear map from the values of an axis to positions in the drawing."""

    low: float
    high: float
    start: float  # position of `low`
    end: float  # position of `high`

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Scale:
        """Return the scale on which `values` fill the space between two positions."""
        low, high = min(values), max(values)
        if low == high:
            high = low + 1
        return cls(low, high, start, end)

    def position(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return round(self.start + fraction * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[str, float]]:
        """Return the label and the position of each tick."""
        return [(f"{value:.4g}", self.position(value)) for value in ticks(self.low, self.high)]


@dataclass(frozen=True)
class Circle:
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Curve:
    """One curve as it is drawn."""

    name: str
    colour: str  # variable of the page's style
    name_x: float  # right end of its name in the legend
    line: str  # SVG path; empty for bubbles
    circles: list[Circle]


def chart(title: str, x_label: str, curves: Mapping[str, Sequence[Point]]) -> Markup:
    """Draw up to two curves with axes as an SVG.

    Args:
        title: heading of the chart.
        x_label: name of the x axis.
        curves: points of each curve by its name. Points (x, y) are joined by a line; points
            (x, y, share) are circles of that share of an area, without a line.

    Returns:
        The SVG, which templates do not escape again; empty where no curve has a point.
    """
    thinned = {}
    for name, points in curves.items():
        if points:
            stride = max(1, len(points) // MAX_POINTS_PER_CURVE)
            thinned[name] = points[::stride]
    if not thinned:
        return Markup("")
    all_points = list(itertools.chain(*thinned.values()))
    x_scale = Scale.around([point[0] for point in all_points], LEFT, RIGHT)
    y_scale = Scale.around([point[1] for point in all_points], BOTTOM, TOP)

    # The last curve is first: its name is at the right end of the legend.
    drawn = []
    name_x = RIGHT
    for name, colour in zip(reversed(thinned), COLOURS):
        circles = []
        for x, y, *share in thinned[name]:
            radius = round(2 + 14 * math.sqrt(share[0]), 1) if share else 2.5
            circles.append(Circle(x_scale.position(x), y_scale.position(y), radius))
        is_line = len(thinned[name][0]) == 2
        path = "M" + "L".join(f"{c.x} {c.y}" for c in circles) if is_line else ""
        if len(circles) >= MAX_POINTS_WITH_CIRCLES:
            circles = []
        drawn.append(Curve(name, colour, name_x, path, circles))
        name_x -= LEGEND_WIDTH_PER_CHARACTER * len(name) + LEGEND_GAP

    scales = {"x": x_scale, "y": y_scale}
    values = {"title": title, "x_label": x_label, "scales": scales, "curves": drawn}
    return render_template("chart.svg", values)


def ticks(low: float, high: float) -> list[float]:
    """Return two to seven multiples of a round number from `low` to `high`."""
    magnitude = 10 ** math.floor(math.log10((high - low) / 2))
    round_numbers = [magnitude * factor for factor in (0.2, 0.5, 1, 2, 5)]
    step = next(number for number in round_numbers if (high - low) / number <= MAX_TICKS - 1)
    # A multiple that rounding puts just outside of the range still counts.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [multiple * step for multiple in range(first, last + 1)]
