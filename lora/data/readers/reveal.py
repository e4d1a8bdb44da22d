"""REVEAL: a table of one row for each piece of evidence of each step of an answer; the rows of an
answer make a chain.

A logical step is right (1) or not (0), an attributed one is supported fully (1), partially (0.5) or
not (0) by its best piece of evidence, and one that is both is worth the lower of the two. Other
columns than the names below are named in [data.reveal_columns]: not all of these could be verified,
as the data may not be passed on in plain text.
"""

from lora.common.errors import UserError
from lora.config.schema import REVEAL_COLUMNS
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"answer_id", "full_answer"},)
LABELS = {
    "attribution_label": {"fully": 1.0, "partially": 0.5, "unsupported": 0.0, "contradictory": 0.0},
    "correctness_label": {"correct": 1.0, "incorrect": 0.0},
}
TERMS = "REVEAL's owners permit it as a test set, not as a training set (its gate; CC BY-ND 4.0)"


def examples(rows, data):
    names = {column: data.reveal_columns.get(column, column) for column in REVEAL_COLUMNS}
    answers = {}  # answer_id -> (where, question, {step_idx: [the rows of its evidence]})
    for where, row in rows:
        absent = [name for name in names.values() if name not in row]
        if absent:
            raise UserError(
                f"{where}: no column {', '.join(absent)}; name yours in [data.reveal_columns]."
            )
        row = {
            column: str("" if row[name] is None else row[name]).strip()
            for column, name in names.items()
        }
        if not row["step_idx"].isdigit():
            raise UserError(f"{where}: step_idx {row['step_idx']!r}; expected a number.")
        _, _, steps = answers.setdefault(row["answer_id"], (where, row["question"], {}))
        steps.setdefault(int(row["step_idx"]), []).append((where, row))
    terms = "" if data.reveal_train_i_have_permission else TERMS
    for where, question, steps in answers.values():
        pieces = [steps[i] for i in sorted(steps)]
        texts = [rows[0][1]["step"] for rows in pieces]
        yield chain(where, question, texts, [label_of(rows) for rows in pieces], terms=terms)


def label_of(rows):
    """The label of a step from the rows of its evidence, or None where it has neither kind of
    label.
    """
    kind = rows[0][1]["type_label"].lower()
    values = []
    for column, other in (("attribution_label", "logic"), ("correctness_label", "attribution")):
        found = [value_of(where, column, row[column]) for where, row in rows if row[column]]
        if found and not kind.startswith(other):
            values.append(max(found))
    return min(values, default=None)


def value_of(where, column, text):
    known = LABELS[column]
    if text.lower() not in known:
        raise UserError(f"{where}: {column} {text!r}; expected one of {', '.join(known)}.")
    return known[text.lower()]
