"""Chains of which only the first wrong step is known: those before it are right, those after it
have no label.

BIG-Bench-Mistake   {"input", "steps", "mistake_index"}: 0-based, null where no step is wrong
ProcessBench        {"problem", "steps", "label"}: 0-based, -1 where no step is wrong
"""

from lora.common.errors import UserError
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"input", "steps", "mistake_index"}, {"problem", "steps", "label"})


def examples(rows, data):
    for where, row in rows:
        prompt, name, none = (
            ("input", "mistake_index", None) if "mistake_index" in row else ("problem", "label", -1)
        )
        steps, first = row["steps"], row[name]
        count = len(steps) if isinstance(steps, list) else 0
        if first == none:
            labels = [1.0] * count
        elif type(first) is int and 0 <= first < count:
            labels = [1.0] * first + [0.0] + [None] * (count - first - 1)
        else:
            none = "null" if none is None else none
            raise UserError(
                f"{where}: {name} {first!r}; expected {none}, or 0 to {count - 1} (the first wrong step)."
            )
        yield chain(where, row[prompt], steps, labels)
