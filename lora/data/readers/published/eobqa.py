"""eOBQA: two facts and a hypothesis, whose label is the share of "yes" among three votes."""

from lora.config.schema import DataConfig
from lora.data.examples import Examples, require_text
from lora.data.readers.steps import make_chain

TASK = "score"
FORMS = ({"QID", "Question", "Answer", "Fact1", "Fact2", "Turks", "DF"},)
OPTIONAL: set[str] = set()


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    votes = require_text(where, "Turks", row["Turks"]).split()
    labels = [None, None, votes.count("yes") / len(votes)]
    question = f"{row['Question']} {row['Answer']}"
    yield make_chain(where, question, [row["Fact1"], row["Fact2"], row["DF"]], labels)
