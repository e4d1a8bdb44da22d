"""{"sentence1", "sentence2", "score" (or "label")}: a chain of one step with its label."""

from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, SourceRows, label, string, weight

TASK = "score"
FORMS = ({"sentence1", "sentence2", "score"}, {"sentence1", "sentence2", "label"})


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        value = row.get("label") if row.get("score") is None else row["score"]
        labels = [label(where, value, data.label_max)]
        prompt = string(where, "sentence1", row["sentence1"])
        steps = [string(where, "sentence2", row["sentence2"])]
        yield Example(where, prompt=prompt, steps=steps, labels=labels, weight=weight(where, row))
