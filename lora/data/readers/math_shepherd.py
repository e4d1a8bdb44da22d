"""Math-Shepherd: {"input", "label", "task"}, twice the same text, with "ки" after every step, or
its rating + or -.

    input    A problem. Step 1: a step ки
Step 2: another ки
    label    A problem. Step 1: a step +
Step 2: another -

The problem ends at "Step 1:", or at its last question mark. "Step 1: " is taken off the steps: the
layout may add it.
"""

import re

from lora.common.errors import UserError
from lora.data.examples import string
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"input", "label", "task"},)
MARK = "ки"
RATINGS = {"+": 1.0, "-": 0.0}


def examples(rows, data):
    for where, row in rows:
        text, rated = string(where, "input", row["input"]), string(where, "label", row["label"])
        begin = re.search(r"\bstep 1:", text, re.IGNORECASE)
        start = begin.start() if begin else text.rfind("?", 0, text.find(MARK)) + 1
        if not start:
            yield "no end of the problem"
            continue
        match = re.fullmatch("([-+]|ки)".join(map(re.escape, text.split(MARK))), rated)
        if not match or MARK not in text[start:]:
            raise UserError(
                f"{where}: label is not the text of input with + or - in the place of every {MARK}."
            )
        ratings = match.groups()[text[:start].count(MARK) :]
        parts = text[start:].split(MARK)
        steps = [re.sub(r"(?i)^\s*step \d+:\s*", "", part).strip() for part in parts[:-1]]
        yield chain(where, text[:start].strip(), steps, [RATINGS.get(rating) for rating in ratings])
