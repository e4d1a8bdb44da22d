"""Solutions of which only the outcome is known, for choosing the best of several: their steps have
no labels.

{"prompt", "steps", "is_correct"}, rows of one prompt being its candidates; or GSM8K's
example_model_solutions.jsonl, {"question", "ground_truth", NAME: {"solution", "is_correct"}, ...},
where a step is a line.
"""

from lora.common.errors import UserError
from lora.data.examples import string
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"prompt", "steps", "is_correct"}, {"question", "ground_truth"})


def examples(rows, data):
    for where, row in rows:
        if "steps" in row:
            prompt, solutions = row["prompt"], [(row["steps"], row["is_correct"])]
        else:
            prompt, of_models = row["question"], [v for v in row.values() if isinstance(v, dict)]
            texts = [string(where, "solution", of.get("solution")).strip() for of in of_models]
            solutions = [
                (text.split("\n"), of.get("is_correct")) for text, of in zip(texts, of_models)
            ]
        for steps, correct in solutions:
            if not isinstance(correct, bool) or not isinstance(steps, list):
                raise UserError(
                    f"{where}: is_correct {correct!r}; expected true or false, and steps in a list."
                )
            steps = [step for step in steps if not isinstance(step, str) or step.strip()]
            yield chain(where, prompt, steps, [None] * len(steps), outcome=correct)
