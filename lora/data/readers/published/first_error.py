"""Chains of which only the first wrong step is known: the steps after it have no label.

BIG-Bench-Mistake   {"input", "steps", "mistake_index"}: 0-based, null where no step is wrong
ProcessBench        {"problem", "steps", "label"}: 0-based, -1 where no step is wrong
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples, SourceRows
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"input", "steps", "mistake_index"}, {"problem", "steps", "label"})
OPTIONAL: set[str] = set()


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        is_big_bench = "mistake_index" in row
        prompt = row["input" if is_big_bench else "problem"]
        name = "mistake_index" if is_big_bench else "label"
        none_is_wrong = None if is_big_bench else -1
        steps = row["steps"]
        first_wrong = row[name]
        count = len(steps) if isinstance(steps, list) else 0
        if first_wrong == none_is_wrong:
            labels = [1.0] * count
        elif type(first_wrong) is int and 0 <= first_wrong < count:
            labels = [1.0] * first_wrong + [0.0] + [None] * (count - first_wrong - 1)
        else:
            none = "null" if is_big_bench else "-1"
            expected = f"expected {none}, or 0 to {count - 1} (the first wrong step)"
            raise UserError(f"{where}: {name} {first_wrong!r}; {expected}.")
        yield chain(where, prompt, steps, labels)
