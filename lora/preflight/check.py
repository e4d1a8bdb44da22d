"""`--check`: what a run takes for granted, tested on the user's own data and model before it.

A check is a function of a Trial that returns a Result, or None where it does not apply. The checks
run in the order of DATA and MODEL. They train the task they are given, and the last one merges it.
"""

from collections.abc import Callable, Mapping
import sys

from lora.common.errors import Stopped, is_out_of_memory
from lora.common.printable_text import printable
from lora.data.raw_data import RawData
from lora.data.row_display import row_as_text
from lora.model.run import Run
from lora.preflight.check_result import FAIL, Result
from lora.preflight.data_checks import DATA
from lora.preflight.model_checks import MODEL
from lora.preflight.trial import Trial, keep_layers_to_check


def check(run: Run, raw_data: RawData, data_facts: dict) -> None:
    """Print the result of every check. Raises Stopped where one says FAIL."""
    note = keep_layers_to_check(run.task)
    trial = Trial(run, raw_data, data_facts)
    failed = run_checks(DATA, trial)
    print()
    for example, tokenised in trial.tokenised_examples[:3]:
        print(f"--- {printable(example.where)}")
        for row in tokenised.rows[:3]:
            print(row_as_text(row, run.task.tokenizer, sys.stdout.isatty()).rstrip("\n"))
    if note:
        note += "; "
    sample = f"{len(trial.sample)} training sequences, {len(trial.sample.tokens)} tokens"
    print(f"\n{note}the model on {sample} in all, in fp32:")
    failed += run_checks(MODEL, trial)
    if failed:
        raise Stopped(f"--check: {len(failed)} failed: {', '.join(failed)}.")
    print("no check failed")


def run_checks(checks: Mapping[str, Callable[[Trial], Result | None]], trial: Trial) -> list[str]:
    """Print a line for each check; return the names of those that failed or ended in an error."""
    failed = []
    for name, run_check in checks.items():
        try:
            result = run_check(trial)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            message = " ".join(str(error).split())[:200]
            result = Result(FAIL, f"ended with {type(error).__name__}: {message}")
        if result is not None:
            print(printable(f"{result.status}  {name}: {result.text}"), flush=True)
            if result.status == FAIL:
                failed.append(name)
    return failed
