"""Scored steps to look at: each step in the colour of its score, in the terminal or on one page."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora.common.printable_text import printable
from lora.data.examples import Example
from lora.evaluation.html_templates import render_template
from lora.evaluation.step_metrics import Scores, first_below

Table = list[list[str]]  # cells of a table, the first row a heading


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


def number(value: float | None, ends: Sequence[float] | None) -> str:
    """Return a cell of a table: a value, the interval it lies in, or both."""
    parts = []
    if value is not None:
        parts.append(f"{value:.3f}")
    if ends:
        low, high = ends
        parts.append(f"[{low:.3f}, {high:.3f}]")
    return " ".join(parts)


def table(report: dict) -> Table:
    """Return what `step_metrics.report` measured: a column for each scorer and each difference."""
    measures, intervals = report["measures"], report["intervals"]
    differences = report["differences"]
    rows = [["measure", *measures, *(f"less {scorer}" for scorer in differences)]]
    for measure in measures["scores"]:
        row = [measure]
        for scorer, values in measures.items():
            row.append(number(values[measure], intervals[scorer].get(measure)))
        row += [number(None, of_scorer.get(measure)) for of_scorer in differences.values()]
        rows.append(row)
    return rows


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
    values = {"title": title, "numbers": numbers, "threshold": threshold}
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
    """Return steps for the page; "first" is under the threshold, "gold" first labelled wrong."""
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
