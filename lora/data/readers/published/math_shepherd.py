"""Math-Shepherd: {"input", "label", "task"}; label has a rating for every "ки" of input.

    input    A problem. Step 1: a step ки
Step 2: another ки
    label    A problem. Step 1: a step +
Step 2: another -

The problem ends at "Step 1:", or at its last question mark. "Step 1: " is taken off the steps.
"""

import re

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples, require_text
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"input", "label", "task"},)
OPTIONAL: set[str] = set()
MARK = "ки"
RATINGS = {"+": 1.0, "-": 0.0}  # a step that still has its mark has no label


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    text = require_text(where, "input", row["input"])
    rated_text = require_text(where, "label", row["label"])
    first_step = re.search(r"\bstep 1:", text, re.IGNORECASE)
    if first_step:
        start = first_step.start()
    else:
        start = text.rfind("?", 0, text.find(MARK)) + 1
    if start == 0:
        yield "no end of the problem"
        return
    pattern = "([-+]|ки)".join(re.escape(part) for part in text.split(MARK))
    match = re.fullmatch(pattern, rated_text)
    if not match or MARK not in text[start:]:
        expected = f"the text of input with + or - in the place of every {MARK}"
        raise UserError(f"{where}: label is not {expected}.")
    marks_in_problem = text[:start].count(MARK)
    labels = [RATINGS.get(rating) for rating in match.groups()[marks_in_problem:]]
    parts = text[start:].split(MARK)[:-1]
    steps = [re.sub(r"(?i)^\s*step \d+:\s*", "", part).strip() for part in parts]
    yield make_chain(where, text[:start].strip(), steps, labels)
