"""{"text"}: a document for language modelling."""

from lora.readers import Example, string

TASK = "lm"
FORMS = ({"text"},)


def example(where, row, label_max):
    return Example(where, text=string(where, "text", row["text"]))
