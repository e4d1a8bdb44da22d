"""REVEAL: a table with a row for each piece of evidence of each step of an answer.

A logical step is right (1) or not (0). An attributed step is supported fully (1), partially (0.5)
or not (0) by its best piece of evidence. A step of both kinds has the lower of the two labels.
--columns names columns that are called otherwise: not all names could be verified, as the data may
not be passed on in plain text.
"""

from collections.abc import Iterator

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"answer_id", "full_answer"},)
REVEAL_COLUMNS = (
    "answer_id", "question", "step_idx", "step",
    "type_label", "attribution_label", "correctness_label",
)  # fmt: skip
OPTIONAL: set[str] = set(REVEAL_COLUMNS)
LABELS = {
    "attribution_label": {"fully": 1.0, "partially": 0.5, "unsupported": 0.0, "contradictory": 0.0},
    "correctness_label": {"correct": 1.0, "incorrect": 0.0},
}
# A step whose type begins so has no label in this column.
ONLY_OTHER_KIND = {"attribution_label": "logic", "correctness_label": "attribution"}
TERMS = "REVEAL's owners permit it as a test set, not as a training set (its gate; CC BY-ND 4.0)"


def examples(where: str, row: dict, data: DataConfig) -> Iterator[dict[str, str]]:
    """Yield the REVEAL_COLUMNS of a row as texts, and its "where". Raises UserError."""
    absent = [name for name in REVEAL_COLUMNS if name not in row]
    if absent:
        advice = f"name yours: --columns {absent[0]}=YOURS"
        raise UserError(f"{where}: no column {', '.join(absent)}; {advice}.")
    evidence = {"where": where}
    for column in REVEAL_COLUMNS:
        evidence[column] = "" if row[column] is None else str(row[column]).strip()
    if not evidence["step_idx"].isdecimal():
        raise UserError(f"{where}: step_idx {evidence['step_idx']!r}; expected a number.")
    for column, labels in LABELS.items():
        text = evidence[column]
        if text and text.lower() not in labels:
            raise UserError(f"{where}: {column} {text!r}; expected one of {', '.join(labels)}.")
    yield evidence


def chains(rows: list[dict[str, str]], data: DataConfig) -> Examples:
    """Yield a chain for each answer, in the order of their first rows."""
    answers: dict[str, dict[int, list[dict]]] = {}  # the rows of each step of each answer
    for row in rows:
        steps = answers.setdefault(row["answer_id"], {})
        steps.setdefault(int(row["step_idx"]), []).append(row)
    terms = "" if data.reveal_train_i_have_permission else TERMS
    for steps in answers.values():
        in_order = [steps[i] for i in sorted(steps)]
        texts = [step_rows[0]["step"] for step_rows in in_order]
        labels = [label_of_step(step_rows) for step_rows in in_order]
        first = next(iter(steps.values()))[0]  # of the answer's rows
        result = make_chain(first["where"], first["question"], texts, labels, terms=terms)
        if isinstance(result, Example):
            result.category = first["category"]
        yield result


def label_of_step(rows: list[dict[str, str]]) -> float | None:
    """Return the label of a step from the rows of its evidence, or None where they have none."""
    kind = rows[0]["type_label"].lower()
    labels = []
    for column, other_kind in ONLY_OTHER_KIND.items():
        values = [LABELS[column][row[column].lower()] for row in rows if row[column]]
        if values and not kind.startswith(other_kind):
            labels.append(max(values))
    return min(labels, default=None)
