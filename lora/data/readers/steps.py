"""{"prompt", "steps" (or "completions"), "labels"}: a chain of steps, each with a label 0..1, a
boolean, or null.
"""

from lora.common.errors import UserError
from lora.data.examples import Example, label, string, weight

TASK = "score"
FORMS = ({"prompt", "steps", "labels"}, {"prompt", "completions", "labels"})


def examples(rows, data):
    for where, row in rows:
        steps, labels = row.get("steps", row.get("completions")), row["labels"]
        if not isinstance(labels, list) or not isinstance(steps, list) or len(labels) != len(steps):
            count = f"{len(steps)} steps" if isinstance(steps, list) else f"steps {steps!r}"
            found = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {labels!r}"
            raise UserError(
                f"{where}: {count} and {found}; expected a label for each step (null: none)."
            )
        labels = [label(where, value, data.label_max) for value in labels]
        yield chain(where, row["prompt"], steps, labels, weight=weight(where, row))


def chain(where, prompt, steps, labels, **more):
    """The Example of a chain, or why it is left out. Raises UserError for a prompt or steps that
    are no texts.
    """
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{where}: steps is {str(steps)[:40]!r}; expected a list of texts.")
    if any(isinstance(step, str) and not step.strip() for step in steps):
        return "an empty step"
    steps = [string(where, f"step {i}", step) for i, step in enumerate(steps, 1)]
    return Example(
        where, prompt=string(where, "prompt", prompt), steps=steps, labels=labels, **more
    )
