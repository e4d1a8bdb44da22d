"""{"sentence1", "sentence2", "score" (or "label")}: a chain of one step with its label."""

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, read_label, read_weight, require_text

TASK = "score"
FORMS = ({"sentence1", "sentence2", "score"}, {"sentence1", "sentence2", "label"})
OPTIONAL: set[str] = {"score", "label", "weight"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    values = [read_label(where, row.get(key), data.label_max) for key in ("score", "label")]
    given = [value for value in values if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(f"{where}: score and label disagree; keep one.")
    labels = given[:1] or [None]
    prompt = require_text(where, "sentence1", row["sentence1"])
    steps = [require_text(where, "sentence2", row["sentence2"])]
    yield Example(where, prompt=prompt, steps=steps, labels=labels, weight=read_weight(where, row))
