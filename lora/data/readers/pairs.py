"""{"sentence1", "sentence2", "score" (or "label")}: a chain of one step with its label."""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, label, string, weight

TASK = "score"
FORMS = ({"sentence1", "sentence2", "score"}, {"sentence1", "sentence2", "label"})
OPTIONAL: set[str] = {"score", "label", "weight"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    values = [row[key] for key in ("score", "label") if row.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise UserError(f"{where}: score and label disagree; keep one.")
    labels = [label(where, values[0] if values else None, data.label_max)]
    prompt = string(where, "sentence1", row["sentence1"])
    steps = [string(where, "sentence2", row["sentence2"])]
    yield Example(where, prompt=prompt, steps=steps, labels=labels, weight=weight(where, row))
