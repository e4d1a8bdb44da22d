"""eOBQA: two facts and a hypothesis, whose label is the share of "yes" among three votes."""

from lora.config.schema import DataConfig
from lora.data.examples import Examples, string
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"QID", "Question", "Answer", "Fact1", "Fact2", "Turks", "DF"},)
OPTIONAL: set[str] = set()


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    votes = string(where, "Turks", row["Turks"]).split()
    labels = [None, None, votes.count("yes") / len(votes)]
    question = f"{row['Question']} {row['Answer']}"
    yield chain(where, question, [row["Fact1"], row["Fact2"], row["DF"]], labels)
