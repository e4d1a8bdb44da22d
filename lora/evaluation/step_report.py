"""Scored steps to look at: each step in the colour of its score, in the terminal or on one page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora.common.terminal import printable
from lora.data.examples import Example
from lora.evaluation.pages import render_template
from lora.evaluation.step_metrics import first_below

Rows = list[list[str]]  # cells of a table, the first row a heading


@dataclass(frozen=True)
class Step:
    """A step as the page shows it."""

    text: str
    score: str  # with its label, where there is one
    css_colour: str
    css_classes: str  # "first": first under the threshold; "gold": first that is labelled wrong


@dataclass(frozen=True)
class Chain:
    """A chain of steps as the page shows it."""

    where: str  # file:line
    problem: str
    steps: list[Step]


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


def table(report: dict) -> Rows:
    """Return what `prm_metrics.report` measured: a column for each scorer and each difference."""
    measures, intervals, differences = (
        report["measures"],
        report["intervals"],
        report["differences"],
    )
    heading = ["measure", *measures]
    heading += [f"less {scorer}" for scorer in differences]

    rows = [heading]
    for measure in measures["scores"]:
        row = [measure]
        for scorer, values in measures.items():
            row.append(number(values[measure], intervals[scorer].get(measure)))
        row += [number(None, of_scorer.get(measure)) for of_scorer in differences.values()]
        rows.append(row)
    return rows


def lines(
    example: Example,
    scores: np.ndarray,
    threshold: float,
    colours: bool,
) -> Iterator[str]:
    """Yield a line for each step of a chain: its score, its label, and a mark at the first error.

    Args:
        example: the chain.
        scores: scores of its steps, [steps].
        threshold: the first step with a score below it is the first error.
        colours: whether the terminal shows colours.
    """
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
    title: str,
    examples: Sequence[Example],
    scores: Sequence[np.ndarray],
    threshold: float,
    numbers: Rows,
) -> str:
    """Return the page of scored steps.

    Args:
        title: heading of the page.
        examples: the chains.
        scores: scores of each chain's steps, [steps].
        threshold: the first step with a score below it is framed.
        numbers: a table shown above the chains; may be empty.
    """
    return render_template(
        "steps.html",
        title=title,
        numbers=numbers,
        threshold=threshold,
        chains=chains(examples, scores, threshold),
    )


def chains(
    examples: Sequence[Example],
    scores: Sequence[np.ndarray],
    threshold: float,
) -> list[Chain]:
    """Return the chains as lora/templates/macros.html draws them."""
    shown = []
    for example, step_scores in zip(examples, scores):
        steps = coloured_steps(example, step_scores, threshold)
        shown.append(Chain(example.where, example.prompt, steps))
    return shown


def coloured_steps(example: Example, scores: np.ndarray, threshold: float) -> list[Step]:
    predicted_error = first_below(scores, threshold)
    labelled_error = first_labelled_wrong(example.labels)
    steps = []
    for i, (text, label, score) in enumerate(zip(example.steps, example.labels, scores)):
        css_classes = []
        if i == predicted_error:
            css_classes.append("first")
        if i == labelled_error:
            css_classes.append("gold")
        red, green, blue = colour(score)
        css_colour = f"rgb({red}, {green}, {blue})"
        steps.append(Step(text, score_with_label(score, label), css_colour, " ".join(css_classes)))
    return steps


def first_labelled_wrong(labels: Sequence[float | None]) -> int:
    """Return the index of the first step whose label is below 0.5, or -1."""
    for i, label in enumerate(labels):
        if label is not None and label < 0.5:
            return i
    return -1
