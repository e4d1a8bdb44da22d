"""{"prompt", "steps" (or "completions"), "labels"}: a chain of steps, each with a label 0..1, a boolean, or null."""

from lora.errors import UserError
from lora.readers import Example, label, string

TASK = "score"
FORMS = ({"prompt", "steps", "labels"}, {"prompt", "completions", "labels"})


def example(where, row, label_max):
    steps, labels = row.get("steps", row.get("completions")), row["labels"]
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{where}: steps must be a list of texts.")
    steps = [string(where, f"step {i}", step) for i, step in enumerate(steps, 1)]
    if not isinstance(labels, list) or len(labels) != len(steps):
        found = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {labels!r}"
        raise UserError(f"{where}: {len(steps)} steps and {found}; expected a label for each step (null: none).")
    labels = [label(where, value, label_max) for value in labels]
    return Example(where, prompt=string(where, "prompt", row["prompt"]), steps=steps, labels=labels)
