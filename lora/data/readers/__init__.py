"""Readers turn files into examples: one small file per format, standard library only (they run
before torch loads).

A row of our own formats may have a "weight", a number from 0 on, by which its loss is multiplied.
"""

from collections import Counter
from itertools import groupby

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data import files
from lora.data.readers import (
    arithmetic,
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
    chat,
    questions,
    steps,
    pairs,
    text,
    prm800k,
    math_shepherd,
    first_error,
    prmbench,
    eqasc,
    eobqa,
    reveal,
    outcomes,
)


def read(paths, task, data=None, first_dataset_id=0):
    """The examples of several files for `task` ("lm": texts and chats, "score": steps with labels).
    Raises UserError.

    `data` is the [data] table of a configuration, which says how some files are read.
    """
    data, examples = data or DataConfig(), []
    for dataset_id, path in enumerate(paths, first_dataset_id):
        before = len(examples)
        for example in examples_of(path, task, data):
            example.dataset_id = dataset_id
            examples.append(example)
        if len(examples) == before:
            raise UserError(f"{path}: 0 examples; expected one at least.")
    return examples


def examples_of(path, task, data):
    """Yield the examples of one path, and say how many of its rows are left out, and why."""
    if path.startswith("arithmetic:"):
        yield from arithmetic.read(path, task)
        return
    bad, left_out, longest = [], Counter(), data.max_steps_per_example
    for reader, rows in groupby(
        files.rows(path, bad), lambda pair: reader_for(*pair, task=task, readers=READERS, bad=bad)
    ):
        more = reader is not None
        while more:
            try:
                for example in reader.examples(rows, data):
                    if isinstance(example, str):  # why a row is left out
                        left_out[example] += 1
                    else:
                        example.steps, example.labels = (
                            example.steps[:longest],
                            example.labels[:longest],
                        )
                        yield example
                more = False
            # Of one row; the rows after it are read as well, so that all bad ones are named
            except UserError as error:
                bad.append(error)
    files.refuse(path, bad)
    if left_out:
        print(
            f"note: {path}: left out: {', '.join(f'{count} rows ({why})' for why, count in left_out.most_common())}"
        )


def reader_for(where, row, task, readers, bad):
    """The one of `readers` whose form has the keys of the row; None, and the reason added to `bad`,
    where there is none.
    """
    fitting = [r for r in readers if any(form <= row.keys() for form in r.FORMS)]
    reader = next((r for r in fitting if r.TASK == task), None)
    if reader is None and fitting:
        found = f"keys {', '.join(row)} in a run of --task {task}"
        bad.append(
            UserError(f"{where}: {found}; add --task {fitting[0].TASK}, or take other rows.")
        )
    elif reader is None:
        known = "; ".join(
            ", ".join(sorted(form)) for r in readers for form in r.FORMS if r.TASK == task
        )
        bad.append(
            UserError(f"{where}: keys found: {', '.join(map(str, row))}; expected one of: {known}.")
        )
    return reader
