"""eQASC: a JSON list of questions with answers; the right one has chains of two facts, each judged
as a whole.

The steps are the two facts and the hypothesis that they are to show, and the judgement ("yes", or
why not) is the label of the last step, since it is about the chain. The facts that the question was
made from are right without a judgement.
"""

from lora.common.errors import UserError
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"question", "answerKey", "fact1", "fact2"},)


def examples(rows, data):
    for where, row in rows:
        try:
            stem, gold = row["question"]["stem"], {row["fact1"], row["fact2"]}
            for choice in row["question"]["choices"]:
                if choice["label"] != row["answerKey"]:
                    continue
                hypothesis = choice.get("df") or f"{stem} {choice['text']}"
                for first, second, about in choice.get("chains") or []:
                    facts = [first["text"], second["text"]]
                    judged = ((about or {}).get("turk_label") or {}).get("label")
                    judged = "yes" if {*facts} == gold else judged
                    if judged is None:
                        yield "a chain that nobody judged"
                    else:
                        labels = [None, None, float(judged == "yes")]
                        yield chain(where, f"{stem} {choice['text']}", [*facts, hypothesis], labels)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: not a row of eQASC ({type(error).__name__}: {error})."
            ) from None
