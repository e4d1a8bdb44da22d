"""PRM800K: a problem and, for every step, completions that were rated -1, 0 or 1.

Normally one completion of a step was chosen to continue from. The chosen path is one example. Each
other rated completion is another: the path before it, without labels, and that completion with its
label, so that each rating is used exactly once. A completion that a human wrote gets label 1. The
rating 0 ("not wrong, no progress") becomes `neutral_label`.
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"labeler", "question", "label"},)
OPTIONAL: set[str] = {"is_quality_control_question", "is_initial_screening_question"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    ratings = {1: 1.0, 0: data.neutral_label, -1: 0.0, None: None}
    try:
        problem = row["question"]["problem"]
        steps = row["label"]["steps"]
        finish = row["label"].get("finish_reason")
        if row.get("is_quality_control_question") or row.get("is_initial_screening_question"):
            yield "quality control or screening"
        elif finish in ("bad_problem", "give_up"):
            yield finish.replace("_", " ")
        else:
            for texts, labels in chains(steps, ratings):
                yield make_chain(where, problem, texts, labels)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        found = f"not a row of PRM800K ({type(error).__name__}: {error})"
        raise UserError(f"{where}: {found}.") from None


def chains(steps: list[dict], ratings: dict) -> list[tuple[list, list]]:
    """Return (texts, labels) of the chosen path, and of every completion beside it."""
    path: list[str] = []
    path_labels: list[float | None] = []
    beside_path = []
    for step in steps:
        completions = step.get("completions") or []
        rated = [(each["text"], ratings[each.get("rating")]) for each in completions]
        chosen = step.get("chosen_completion")
        human = step.get("human_completion")
        if chosen is None and human:
            text = human["text"] if isinstance(human, dict) else human
            label = 1.0
        elif chosen is None and not rated:
            break
        else:
            # Without a choice all completions were wrong and labelling ended here. The first one
            # ends the path, and the others become examples of their own.
            index = 0 if chosen is None else chosen
            if index < 0:
                raise IndexError(f"chosen_completion {chosen}")
            text, label = rated.pop(index)
        for other_text, other_label in rated:
            if other_label is not None:
                beside_path.append(([*path, other_text], [None] * len(path) + [other_label]))
        path.append(text)
        path_labels.append(label)
        if chosen is None and not human:
            break
    return [(path, path_labels), *beside_path] if path else beside_path
