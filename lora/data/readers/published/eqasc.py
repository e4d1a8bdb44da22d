"""eQASC: a JSON list of questions with answers. The right answer has chains of two facts.

The steps are the two facts and the hypothesis that they should show. The judgement ("yes", or why
not) is about the chain, so it is the label of the last step. The facts that the question was made
from are right without a judgement.
"""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"question", "answerKey", "fact1", "fact2"},)
OPTIONAL: set[str] = set()


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    try:
        stem, choices = row["question"]["stem"], row["question"]["choices"]
        known_facts = {row["fact1"], row["fact2"]}
        for choice in choices:
            if choice["label"] == row["answerKey"]:
                yield from chains(where, f"{stem} {choice['text']}", choice, known_facts)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        problem = f"not a row of eQASC ({type(error).__name__}: {error})"
        raise UserError(f"{where}: {problem}.") from None


def chains(where: str, question: str, choice: dict, known_facts: set) -> Examples:
    hypothesis = choice.get("df") or question
    for first, second, about in choice.get("chains") or []:
        facts = [first["text"], second["text"]]
        judgement = ((about or {}).get("turk_label") or {}).get("label")
        if set(facts) == known_facts:
            judgement = "yes"
        if judgement is None:
            yield "a chain that nobody judged"
        else:
            labels = [None, None, float(judgement == "yes")]
            yield make_chain(where, question, [*facts, hypothesis], labels)
