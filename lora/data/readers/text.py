"""{"text"}: a document for language modelling."""

from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, SourceRows, string, weight

TASK = "lm"
FORMS = ({"text"},)
OPTIONAL: set[str] = {"weight"}


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        yield Example(where, text=string(where, "text", row["text"]), weight=weight(where, row))
