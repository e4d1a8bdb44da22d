"""PRM800K: a problem and, for every step, the completions that were rated -1, 0 or 1, and which one
was gone on from.

The chosen path is an example; every other completion is one as well, of the same steps up to it and
a label of its own alone, so that each rating is asked for once. A human's own completion is right.
0 ("not wrong, no progress") becomes `neutral_label`; a completion that was not rated has no label.
Rows that served to control or to choose labellers are left out, and those of problems that were
called bad or given up.
"""

from lora.common.errors import UserError
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"labeler", "question", "label"},)


def examples(rows, data):
    ratings = {1: 1.0, 0: data.neutral_label, -1: 0.0, None: None}
    for where, row in rows:
        try:
            problem, steps, finish = (
                row["question"]["problem"],
                row["label"]["steps"],
                row["label"]["finish_reason"],
            )
            if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
                yield "quality control or screening"
            elif finish in ("bad_problem", "give_up"):
                yield finish.replace("_", " ")
            else:
                for texts, labels in chains(steps, ratings):
                    yield chain(where, problem, texts, labels)
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                f"{where}: not a row of PRM800K ({type(error).__name__}: {error})."
            ) from None


def chains(steps, ratings):
    """Yield (texts, labels) of the chosen path, and of every completion beside it."""
    texts, labels, others = [], [], []
    for step in steps:
        rated = [
            (completion["text"], ratings[completion["rating"]])
            for completion in step["completions"] or []
        ]
        chosen, human = step["chosen_completion"], step.get("human_completion")
        if chosen is None and human:
            taken = (human["text"] if isinstance(human, dict) else human, 1.0)
        elif chosen is None and not rated:
            break
        # Where labelling ended at an error nothing was gone on from: the first completion ends the
        # path
        else:
            if (chosen or 0) < 0:
                raise IndexError(f"chosen_completion {chosen}")
            taken = rated.pop(chosen or 0)
        others += [
            ([*texts, text], [None] * len(texts) + [label])
            for text, label in rated
            if label is not None
        ]
        texts, labels = [*texts, taken[0]], [*labels, taken[1]]
        if chosen is None and not human:
            break
    if texts:
        yield texts, labels
    yield from others
