"""`--check`: the user's own data and model, proved before a run: one line each, PASS, WARN or FAIL,
and how to mend it.

A check is a function of a Trial that gives (PASS, WARN or FAIL, what was found), or None where it
has no bearing. They run in the order of DATA and MODEL, and train the task they are given; the last
of them merges it. The equalities are measured on a few training rows in fp32 and without dropout,
where only a fault makes a difference that rounding does not.
"""

import sys

from lora.common.errors import Stopped
from lora.data.display import row_as_text
from lora.data.raw_data import RawData
from lora.model.run import Run
from lora.preflight.data_checks import DATA
from lora.preflight.model_checks import MODEL
from lora.preflight.trial import FAIL, Trial, keep_first_layers


def check(run: Run, raw_data: RawData, data_facts: dict) -> None:
    """Print the result of every check.

    Args:
        run: its task is trained by the checks, and merged by the last of them.
        raw_data: the examples, some of which are looked at one by one.
        data_facts: what `load_or_tokenise` returned.

    Raises:
        Stopped: a check says FAIL.
    """
    task = run.task
    note = keep_first_layers(task)
    trial = Trial(run, raw_data, data_facts)
    failed = list(failing(trial, DATA))
    print()
    for example, rendered in trial.sample[:3]:
        print(f"--- {example.where}")
        print(
            "\n".join(
                row_as_text(row, task.tokenizer, sys.stdout.isatty()).rstrip("\n")
                for row in rendered.rows[:3]
            )
        )
    used = f"{len(trial.few)} training rows of {len(trial.few.tokens)} tokens"
    print(f"\n{note + '; ' if note else ''}equalities on {used}, in fp32:")
    failed += failing(trial, MODEL)
    if failed:
        raise Stopped(f"--check: {len(failed)} failed: {', '.join(failed)}.")
    print("nothing failed")


def failing(trial, checks):
    """Print the lines of some checks; yields the names of those that failed, or ended in an error."""
    for name, check in checks.items():
        try:
            result = check(trial)
        except Exception as error:
            result = FAIL, f"ends in {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if result:
            print(f"{result[0]}  {name}: {result[1]}", flush=True)
        if result and result[0] == FAIL:
            yield name
