"""PRMBench's own file: an original chain with an error put into it; `error_steps` is a 1-based list
of the wrong steps.

Right steps may follow wrong ones. The original stands in a row for every kind of error; as in the
authors' evaluation it is read once, with the rows whose `classification` is "redundency" (so spelt
there).
"""

from lora.common.errors import UserError
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"modified_question", "modified_process", "error_steps"},)


def examples(rows, data):
    for where, row in rows:
        steps, wrong = row["modified_process"], row["error_steps"]
        count = len(steps) if isinstance(steps, list) else 0
        if not isinstance(wrong, list) or not all(
            type(i) is int and 1 <= i <= count for i in wrong
        ):
            raise UserError(
                f"{where}: error_steps {wrong!r}; expected a list of numbers from 1 to {count}."
            )
        labels = [0.0 if i in wrong else 1.0 for i in range(1, count + 1)]
        yield chain(where, row["modified_question"], steps, labels)
        if row.get("classification") == "redundency":
            steps = row.get("original_process")
            yield chain(where, row.get("original_question"), steps, [1.0] * len(steps or []))
