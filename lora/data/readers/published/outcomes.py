"""Solutions whose steps have no labels; only the outcome is known, to choose the best of several.

{"prompt", "steps", "is_correct"}, where rows of one prompt are its candidates; or GSM8K's
example_model_solutions.jsonl, {"question", "ground_truth", NAME: {"solution", "is_correct"}, ...},
where a step is a line.
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples, require_text
from lora.data.readers.steps import make_chain

TASK = "score"
CANDIDATE = {"prompt", "steps", "is_correct"}
FORMS = (CANDIDATE, {"question", "ground_truth"})
OPTIONAL = None  # the keys of GSM8K's solutions are names of models


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    prompt = row["prompt" if row.keys() >= CANDIDATE else "question"]
    for steps, correct in solutions(where, row):
        if not isinstance(correct, bool) or not isinstance(steps, list):
            expected = "expected true or false, and steps in a list"
            raise UserError(f"{where}: is_correct {correct!r}; {expected}.")
        steps = [step for step in steps if not isinstance(step, str) or step.strip()]
        yield make_chain(where, prompt, steps, [None] * len(steps), outcome=correct)


def solutions(where: str, row: dict) -> list[tuple]:
    """Return (steps, is_correct) of each solution, as they stand in the row."""
    if row.keys() >= CANDIDATE:
        return [(row["steps"], row["is_correct"])]
    results = []
    for value in row.values():
        if isinstance(value, dict):
            text = require_text(where, "solution", value.get("solution")).strip()
            results.append((text.split("\n"), value.get("is_correct")))
    return results
