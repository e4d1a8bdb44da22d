"""eOBQA: a table of chains of two facts and a hypothesis, with three votes each.

The share of "yes" is the label of the last step.
"""

from lora.config.schema import DataConfig
from lora.data.examples import Examples, SourceRows, string
from lora.data.readers.steps import chain

TASK = "score"
FORMS = ({"QID", "Question", "Answer", "Fact1", "Fact2", "Turks", "DF"},)


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        votes = string(where, "Turks", row["Turks"]).split()
        labels = [None, None, votes.count("yes") / len(votes)]
        question = f"{row['Question']} {row['Answer']}"
        yield chain(where, question, [row["Fact1"], row["Fact2"], row["DF"]], labels)
