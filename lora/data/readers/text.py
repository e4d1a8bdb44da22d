"""{"text"}: a document for language modelling."""

from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, read_weight, require_text

TASK = "lm"
FORMS = ({"text"},)
OPTIONAL: set[str] = {"weight"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    text = require_text(where, "text", row["text"])
    yield Example(where, text=text, weight=read_weight(where, row))
