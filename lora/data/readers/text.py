"""{"text"}: a document for language modelling."""

from lora.data.examples import Example, string, weight

TASK = "lm"
FORMS = ({"text"},)


def examples(rows, data):
    for where, row in rows:
        yield Example(where, text=string(where, "text", row["text"]), weight=weight(where, row))
