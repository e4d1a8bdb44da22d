"""Scored steps to look at: each step in the colour of its score, in the terminal or on one page."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora.common.printable_text import printable
from lora.data.examples import Example
from lora.evaluation.html_templates import render_template
from lora.evaluation.step_metrics import Scores, first_below

Table = list[list[str]]  # cells of a table, the first row a heading
MAX_COLUMNS = 100  # of a table in the terminal
INTERVALS = "In brackets: 95 % intervals; beside a baseline, of the scores minus the baseline."


def colour(score: float) -> tuple[int, int, int]:
    """Return (red, green, blue) from red (0) over yellow to green (1); grey for NaN, no score."""
    if np.isnan(score):
        return 225, 225, 225
    red = 255 - 105 * max(0.0, 2 * score - 1)
    green = 150 + 95 * min(1.0, 2 * score)
    return int(red), int(green), 150


def score_with_label(score: float, label: float | None) -> str:
    if label is None:
        return f"{score:.3f}"
    return f"{score:.3f} ({label:g})"


def number(value: float, ends: Sequence[float] | None, sign: str = "") -> str:
    """Return a cell of a table: a value, and the interval that belongs to it, if there is one.

    The ends of the interval of a difference have the `sign` "+" or "-".
    """
    text = format_number(value, "")
    if ends:
        low, high = ends
        text += f" [{format_number(low, sign)}, {format_number(high, sign)}]"
    return text


def format_number(value: float, sign: str) -> str:
    return f"{value:{sign}.3f}" if abs(value) < 10 else f"{value:{sign}.3g}"


def table(report: dict) -> Table:
    """Return what `step_metrics.report` measured: a row for each measure, a column for each scorer.

    INTERVALS says which interval stands beside a number.
    """
    measures, differences = report["measures"], report["differences"]
    rows = [["measure", *measures]]
    for measure in measures["scores"]:
        row = [measure]
        for scorer, values in measures.items():
            is_baseline = scorer in differences
            intervals = differences[scorer] if is_baseline else report["intervals"][scorer]
            sign = "+" if is_baseline else ""
            row.append(number(values[measure], intervals.get(measure), sign))
        rows.append(row)
    return rows


def verdict(report: dict) -> str:
    """Return a sentence: whether the scores tell right steps from wrong ones, beside baselines."""
    if np.isnan(report["measures"]["scores"]["auc"]):
        return "Verdict: none, because no labelled step is wrong, or none is right."
    is_better = {name: ends["auc"][0] > 0 for name, ends in report["differences"].items()}
    better = [name for name, flag in is_better.items() if flag]
    others = [name for name, flag in is_better.items() if not flag]
    if not others:
        text = "tell right steps from wrong ones better than both baselines"
    elif better:
        text = f"beat {better[0]}, but {others[0]} not measurably"
    else:
        text = "beat neither baseline measurably"
    return f"Verdict: by AUC, the scores {text}."


def aligned(rows: Table) -> Iterator[str]:
    """Yield the lines of a table of at most MAX_COLUMNS; a long name has a line of its own."""
    cell_width = max(max(map(len, row[1:])) for row in rows)
    most_cells = max(map(len, rows)) - 1
    longest_name = MAX_COLUMNS - most_cells * (cell_width + 2)
    names = [row[0] for row in rows if len(row[0]) <= longest_name]
    name_width = max(map(len, names), default=0)
    for name, *cells in rows:
        if len(name) > name_width:
            yield printable(name)
            name = ""
        line = name.rjust(name_width)
        for cell in cells:
            line += f"  {cell:{cell_width}}"
        yield printable(line.rstrip())


def lines(example: Example, scores: np.ndarray, threshold: float, colours: bool) -> Iterator[str]:
    """Yield a line for each step of a chain: its score, its label, a mark at the first error."""
    first_error = first_below(scores, threshold)
    for i, (step, label, score) in enumerate(zip(example.steps, example.labels, scores)):
        text = f"{score_with_label(score, label)}  {printable(step)}"
        if i == first_error:
            text += "  <- first error"
        if colours:
            red, green, blue = colour(score)
            text = f"\x1b[48;2;{red};{green};{blue}m\x1b[30m{text}\x1b[0m"
        yield text


def page(
    title: str, examples: Sequence[Example], scores: Scores, threshold: float, numbers: Table
) -> str:
    """Return the page of scored chains, under a table of numbers that may be empty."""
    values = {"title": title, "numbers": numbers, "threshold": threshold, "intervals": INTERVALS}
    values["chains"] = chains(examples, scores, threshold)
    return render_template("steps.html", values)


def chains(examples: Sequence[Example], scores: Scores, threshold: float) -> list[dict]:
    """Return the chains as templates/macros.html draws them."""
    shown = []
    for example, step_scores in zip(examples, scores):
        steps = coloured_steps(example, step_scores, threshold)
        shown.append({"where": example.where, "problem": example.prompt, "steps": steps})
    return shown


def coloured_steps(example: Example, scores: np.ndarray, threshold: float) -> list[dict]:
    """Return steps for the page; "first" is below the threshold, "gold" first labelled wrong."""
    predicted_error = first_below(scores, threshold)
    labels = [np.nan if label is None else label for label in example.labels]
    labelled_error = first_below(labels, 0.5)
    steps = []
    for i, (text, label, score) in enumerate(zip(example.steps, example.labels, scores)):
        css_classes = []
        if i == predicted_error:
            css_classes.append("first")
        if i == labelled_error:
            css_classes.append("gold")
        red, green, blue = colour(score)
        step = {"text": text, "score": score_with_label(score, label)}
        step["css_colour"] = f"rgb({red}, {green}, {blue})"
        step["css_classes"] = " ".join(css_classes)
        steps.append(step)
    return steps
