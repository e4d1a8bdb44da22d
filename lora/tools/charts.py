"""Line and bubble charts: their positions, which lora/evaluation/templates/chart.svg draws."""

from collections.abc import Mapping, Sequence
import math

from markupsafe import Markup

from lora.evaluation.html_templates import render_template

Point = tuple[float, ...]  # (x, y), or (x, y, share): a circle of that share of an area

# Edges of the plotting area; the drawing is 440 wide and 260 high.
LEFT, RIGHT, TOP, BOTTOM = 56, 428, 36, 220
MAX_POINTS_PER_CURVE = 400
MAX_POINTS_WITH_CIRCLES = 30  # a curve with as many points or more is drawn as a line only
MAX_TICKS = 7
COLOURS = ("--a", "--b")  # variables of the page's style, the last curve's first
LEGEND_WIDTH_PER_CHARACTER = 8
LEGEND_GAP = 14


class Scale:
    """A linear map on which the values of an axis fill the space between two positions."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.start, self.end = start, end
        self.low, self.high = min(values), max(values)
        if self.low == self.high:
            self.high = self.low + max(1, abs(self.low))

    def position(self, value: float) -> float:
        fraction = (value - self.low) / (self.high - self.low)
        return round(self.start + fraction * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[str, float]]:
        return [(f"{value:.4g}", self.position(value)) for value in ticks(self.low, self.high)]


def chart(title: str, x_label: str, curves: Mapping[str, Sequence[Point]]) -> Markup:
    """Return an SVG of up to two curves {name: points}; empty where no curve has a point.

    Points (x, y) are joined by a line. Points (x, y, share) are circles without a line.
    """
    thinned, all_points = {}, []
    for name, points in curves.items():
        if points:
            stride = max(1, len(points) // MAX_POINTS_PER_CURVE)
            thinned[name] = points[::stride]
            all_points += thinned[name]
    if not thinned:
        return Markup("")
    x_scale = Scale([point[0] for point in all_points], LEFT, RIGHT)
    y_scale = Scale([point[1] for point in all_points], BOTTOM, TOP)

    # The last curve is first: its name is at the right end of the legend.
    drawn = []
    name_x = RIGHT
    for name, colour in zip(reversed(thinned), COLOURS):
        circles = []
        for x, y, *share in thinned[name]:
            radius = round(2 + 14 * math.sqrt(share[0]), 1) if share else 2.5
            circles.append((x_scale.position(x), y_scale.position(y), radius))
        is_line = len(thinned[name][0]) == 2
        path = "M" + "L".join(f"{x} {y}" for x, y, _ in circles) if is_line else ""
        if len(circles) >= MAX_POINTS_WITH_CIRCLES:
            circles = []
        curve = {"name": name, "colour": colour, "name_x": name_x, "line": path}
        curve["circles"] = circles
        drawn.append(curve)
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
