"""PRMBench's own file: an original chain with errors put into it; `error_steps` counts from 1.

Right steps may follow wrong ones. The original stands in a row for every kind of error; as in the
authors' evaluation it is read once, with the kind "redundency" (so spelt there).
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"modified_question", "modified_process", "error_steps"},)
OPTIONAL: set[str] = {"classification", "original_question", "original_process"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    steps = row["modified_process"]
    wrong = row["error_steps"]
    numbers = range(1, len(steps) + 1 if isinstance(steps, list) else 1)
    if not isinstance(wrong, list) or not all(type(i) is int and i > 0 for i in wrong):
        expected = f"expected a list of numbers from 1 to {len(numbers)}"
        raise UserError(f"{where}: error_steps {wrong!r}; {expected}.")
    if isinstance(steps, list) and any(i not in numbers for i in wrong):
        yield "an error step past the last"
        return
    labels = [0.0 if i in wrong else 1.0 for i in numbers]
    yield make_chain(where, row["modified_question"], steps, labels)
    if row.get("classification") == "redundency":
        steps = row.get("original_process")
        labels = [1.0] * len(steps) if isinstance(steps, list) else []
        yield make_chain(where, row.get("original_question"), steps, labels)
