"""Readers turn the rows of files into examples: one small file per format.

They use the standard library only, because they run before torch is loaded. A row of our own
formats may have a "weight", a number from 0 on, by which its loss is multiplied.
"""

from collections import Counter
from types import ModuleType

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data import arithmetic, files
from lora.data.examples import Example
from lora.data.readers import (
    chat,
    eobqa,
    eqasc,
    first_error,
    math_shepherd,
    outcomes,
    pairs,
    prm800k,
    prmbench,
    questions,
    reveal,
    steps,
    text,
)

# Where a row has the keys of several forms, the first of these readers reads it.
READERS = (
    chat, questions, steps, pairs, text, prm800k, math_shepherd, first_error,
    prmbench, eqasc, eobqa, reveal, outcomes,
)  # fmt: skip


def read(
    paths: list[str], task: str, data: DataConfig | None = None, first_dataset_id: int = 0
) -> list[Example]:
    """Read the examples of files and of arithmetic:SPLIT:COUNT. Raises UserError.

    Args:
        task: "lm" for texts and chats, "score" for steps with labels.
        first_dataset_id: the dataset_id of the first path's examples; the next path has the next.
    """
    data = data or DataConfig()
    examples = []
    for dataset_id, path in enumerate(paths, first_dataset_id):
        if path.startswith("arithmetic:"):
            examples_of_path = list(arithmetic.read(path, task))
        else:
            examples_of_path = read_file(path, task, data)
        if not examples_of_path:
            raise UserError(f"{path}: 0 examples; expected one at least.")
        for example in examples_of_path:
            example.dataset_id = dataset_id
        examples.extend(examples_of_path)
    return examples


def read_file(path: str, task: str, data: DataConfig) -> list[Example]:
    """Read the examples of a file, and print how many rows are left out, and why."""
    results: list[Example | str] = []
    evidence = []  # rows of REVEAL, of which several make an example
    bad_rows: list[UserError] = []
    for where, row in files.read_rows(path, bad_rows):
        try:
            reader = reader_for(where, row, task)
            if reader is reveal:
                evidence.append(reveal.read_evidence(where, row, data))
            else:
                results.extend(reader.examples([(where, row)], data))
        except UserError as error:
            bad_rows.append(error)
    files.raise_bad_rows(path, bad_rows)
    results.extend(reveal.chains(evidence, data))

    examples = [result for result in results if isinstance(result, Example)]
    for example in examples:
        example.steps = example.steps[: data.max_steps_per_example]
        example.labels = example.labels[: data.max_steps_per_example]
    left_out = Counter(result for result in results if isinstance(result, str))
    if left_out:
        reasons = [f"{count} rows ({reason})" for reason, count in left_out.most_common()]
        print(f"note: {path}: left out: {', '.join(reasons)}")
    return examples


def reader_for(where: str, row: dict, task: str) -> ModuleType:
    """Return the first reader of `task` with a form whose keys the row has. Raises UserError."""
    other_task = None
    for reader in READERS:
        fits = any(form <= row.keys() for form in reader.FORMS)
        if fits and reader.TASK == task:
            return reader
        if fits:
            other_task = reader.TASK
    if other_task:
        keys = f"keys {', '.join(row)} in a run of --task {task}"
        raise UserError(f"{where}: {keys}; add --task {other_task}, or take other rows.")
    forms = []
    for reader in READERS:
        if reader.TASK == task:
            forms.extend(", ".join(sorted(form)) for form in reader.FORMS)
    keys = ", ".join(str(key) for key in row)
    raise UserError(f"{where}: keys found: {keys}; expected one of: {'; '.join(forms)}.")
