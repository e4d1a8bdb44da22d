"""{"text"}: a document for language modelling."""

from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, string, weight

TASK = "lm"
FORMS = ({"text"},)
OPTIONAL: set[str] = {"weight"}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    yield Example(where, text=string(where, "text", row["text"]), weight=weight(where, row))
