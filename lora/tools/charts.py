"""Line and bubble charts as SVG: positions are computed here, lora/templates/chart.svg draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import math

from markupsafe import Markup

from lora.evaluation.pages import render_template

Point = tuple[float, ...]  # (x, y), or (x, y, share): a circle of that share of an area


WIDTH, HEIGHT = 440, 260  # of the drawing
LEFT, RIGHT, TOP, BOTTOM = 56, 428, 36, 220  # edges of the plotting area in the drawing
MAX_POINTS_PER_CURVE = 400
MAX_POINTS_WITH_CIRCLES = 30  # a curve with as many points or more is drawn as a line only
MAX_TICKS = 7
COLOURS = (
    "--a",
    "--b",
)  # variables of the page's style: of the last curve, and of the one before it
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
    def around(cls, values: Sequence[float], start: float, end: float) -> "Scale":
        """Return the scale on which `values` fill the space between two positions."""
        low, high = min(values), max(values)
        if low == high:
            high = low + 1
        return cls(low, high, start, end)

    def position(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return round(self.start + fraction * (self.end - self.start), 1)


@dataclass(frozen=True)
class Tick:
    """A round number on an axis."""

    label: str
    position: float


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
    thinned_curves = {name: thinned(points) for name, points in curves.items() if points}
    if not thinned_curves:
        return Markup("")

    all_points: list[Point] = []
    for points in thinned_curves.values():
        all_points += points
    x_scale = Scale.around([point[0] for point in all_points], LEFT, RIGHT)
    y_scale = Scale.around([point[1] for point in all_points], BOTTOM, TOP)

    svg = render_template(
        "chart.svg",
        title=title,
        x_label=x_label,
        x_ticks=axis_ticks(x_scale),
        y_ticks=axis_ticks(y_scale),
        curves=drawn_curves(thinned_curves, x_scale, y_scale),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
    )
    return Markup(svg)  # the template has escaped the texts; a page includes the SVG as it is


def thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Return every n-th point, so that about MAX_POINTS_PER_CURVE remain."""
    stride = max(1, len(points) // MAX_POINTS_PER_CURVE)
    return points[::stride]


def drawn_curves(
    curves: Mapping[str, Sequence[Point]],
    x_scale: Scale,
    y_scale: Scale,
) -> list[Curve]:
    """Lay out curves and their legend, the last curve first: its name is at the right."""
    drawn = []
    name_x = RIGHT
    for name, colour in zip(reversed(curves), COLOURS):
        points = curves[name]
        circles = [circle(point, x_scale, y_scale) for point in points]
        has_line = len(points[0]) == 2
        line = path_through(circles) if has_line else ""
        if len(circles) >= MAX_POINTS_WITH_CIRCLES:
            circles = []
        drawn.append(Curve(name, colour, name_x, line, circles))
        name_x -= LEGEND_WIDTH_PER_CHARACTER * len(name) + LEGEND_GAP
    return drawn


def circle(point: Point, x_scale: Scale, y_scale: Scale) -> Circle:
    """Return the circle at a point: a small one, or one of the point's share of an area."""
    x, y, *share = point
    radius = 2.5
    if share:
        radius = round(2 + 14 * math.sqrt(share[0]), 1)
    return Circle(x_scale.position(x), y_scale.position(y), radius)


def path_through(circles: Sequence[Circle]) -> str:
    """Return an SVG path of straight lines through the centres of circles."""
    centres = [f"{circle.x} {circle.y}" for circle in circles]
    return "M" + "L".join(centres)


def axis_ticks(scale: Scale) -> list[Tick]:
    """Return the ticks of an axis."""
    values = ticks(scale.low, scale.high)
    return [Tick(f"{value:.4g}", scale.position(value)) for value in values]


def ticks(low: float, high: float) -> list[float]:
    """Return two to seven multiples of a round number from `low` to `high`."""
    magnitude = 10 ** math.floor(math.log10((high - low) / 2))
    candidates = [magnitude * factor for factor in (0.2, 0.5, 1, 2, 5)]
    fitting = [step for step in candidates if (high - low) / step <= MAX_TICKS - 1]
    step = fitting[0]

    # A multiple that rounding puts just outside of the range still counts.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [multiple * step for multiple in range(first, last + 1)]
