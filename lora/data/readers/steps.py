"""{"prompt", "steps" (or "completions"), "labels"}: a chain; labels are 0..1, booleans or null."""

from typing import Any

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, read_label, read_weight, require_text

TASK = "score"
FORMS = ({"prompt", "steps", "labels"}, {"prompt", "completions", "labels"})
OPTIONAL: set[str] = {"steps", "completions", "weight"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    given = [row[name] for name in ("steps", "completions") if row.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(f"{where}: steps and completions differ; keep one.")
    steps = given[0] if given else None
    labels = row["labels"]
    if not isinstance(labels, list) or not isinstance(steps, list) or len(labels) != len(steps):
        found = f"{count(steps, 'steps')} and {count(labels, 'labels')}"
        raise UserError(f"{where}: {found}; expected a label for each step (null: none).")
    labels = [read_label(where, value, data.label_max) for value in labels]
    loss_weight = read_weight(where, row)
    result = make_chain(where, row["prompt"], steps, labels)
    if isinstance(result, Example):
        result.weight = loss_weight
    yield result


def count(values: Any, name: str) -> str:
    return f"{len(values)} {name}" if isinstance(values, list) else f"{name} {values!r}"


def make_chain(
    where: str, prompt: Any, steps: Any, labels: list, outcome: bool | None = None, terms: str = ""
) -> Example | str:
    """Return the Example of a chain, or why it is left out. Raises UserError."""
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{where}: steps is {str(steps)[:40]!r}; expected a list of texts.")
    if any(isinstance(step, str) and not step.strip() for step in steps):
        return "an empty step"
    steps = [require_text(where, f"step {i}", step) for i, step in enumerate(steps, 1)]
    prompt = require_text(where, "prompt", prompt)
    return Example(where, prompt=prompt, steps=steps, labels=labels, outcome=outcome, terms=terms)
