"""Chains of which only the first wrong step is known: the steps after it have no label.

BIG-Bench-Mistake   {"input", "steps", "mistake_index"}: 0-based, null where no step is wrong
ProcessBench        {"problem", "steps", "label"}: 0-based, -1 where no step is wrong
MR-Ben              a text from "1" on under MR_BEN[2], "N/A" where no step is wrong
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples
from lora.data.readers.steps import make_chain

TASK = "score"
MR_BEN = ("Question", "Model_Solution_Steps", "Model_Solution_First_Error_Step")
BIG_BENCH = {"input", "steps", "mistake_index"}
PROCESS_BENCH = {"problem", "steps", "label"}
FORMS = (BIG_BENCH, PROCESS_BENCH, set(MR_BEN))
OPTIONAL: set[str] = {"Options", "Model_Solution_Correctness"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    is_joined = row.keys() >= BIG_BENCH | PROCESS_BENCH
    is_big_bench = row.keys() >= BIG_BENCH and not (is_joined and row["input"] is None)
    if is_big_bench:
        prompt = row["input"]
        name = "mistake_index"
        no_error = None
        no_error_text = "null"
    else:
        if row.keys() >= set(MR_BEN):
            row = as_process_bench(where, row)
            if row["label"] is None:
                yield "a wrong solution without its first error"
                return
        prompt = row["problem"]
        name = "label"
        no_error = -1
        no_error_text = "-1"
    steps, first_wrong = row["steps"], row[name]
    count = len(steps) if isinstance(steps, list) else 0
    if first_wrong == no_error:
        labels = [1.0] * count
    elif type(first_wrong) is int and 0 <= first_wrong < count:
        labels = [1.0] * first_wrong + [0.0] + [None] * (count - first_wrong - 1)
    else:
        expected = f"expected {no_error_text}, or 0 to {count - 1} (the first wrong step)"
        raise UserError(f"{where}: {name} {first_wrong!r}; {expected}.")
    yield make_chain(where, prompt, steps, labels)


def as_process_bench(where: str, row: dict) -> dict:
    """Return a row of MR-Ben as one of ProcessBench; its label is None where it is not known."""
    question, steps, first_wrong = [row[name] for name in MR_BEN]
    if first_wrong == "N/A":
        label = -1 if row.get("Model_Solution_Correctness", "correct") == "correct" else None
    elif str(first_wrong).isdecimal() and int(first_wrong) > 0:
        label = int(first_wrong) - 1
    else:
        raise UserError(f"{where}: {MR_BEN[2]} {first_wrong!r}; expected N/A, or 1, 2, ...")
    return {
        "problem": f"{question}\n{row.get('Options') or ''}".strip(),
        "steps": steps,
        "label": label,
    }
