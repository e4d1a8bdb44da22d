"""{"sentence1", "sentence2", "score" (or "label")}: a pair of sentences and a number; a chain of
one step.
"""

from lora.data.examples import Example, label, string, weight

TASK = "score"
FORMS = ({"sentence1", "sentence2", "score"}, {"sentence1", "sentence2", "label"})


def examples(rows, data):
    for where, row in rows:
        score = label(
            where,
            row["score"] if row.get("score") is not None else row.get("label"),
            data.label_max,
        )
        first, second = (string(where, name, row[name]) for name in ("sentence1", "sentence2"))
        yield Example(
            where, prompt=first, steps=[second], labels=[score], weight=weight(where, row)
        )
