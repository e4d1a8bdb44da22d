"""{"sentence1", "sentence2", "score" (or "label")}: a pair of sentences and a number; a chain of one step."""

from lora.readers import Example, label, string

TASK = "score"
FORMS = ({"sentence1", "sentence2", "score"}, {"sentence1", "sentence2", "label"})


def example(where, row, label_max):
    score = label(where, row["score"] if row.get("score") is not None else row.get("label"), label_max)
    first, second = (string(where, name, row[name]) for name in ("sentence1", "sentence2"))
    return Example(where, prompt=first, steps=[second], labels=[score])
