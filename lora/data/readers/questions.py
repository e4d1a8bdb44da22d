"""A prompt and its answer under the names that public sets use: a chat of one user turn and one
assistant turn.

{"prompt", "completion"}    {"question", "answer"}    {"instruction", "input" (may be absent or
empty), "output"}
"""

from lora.data.examples import Example, string, weight

TASK = "lm"
NAMES = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
FORMS = tuple(map(set, NAMES))


def examples(rows, data):
    for where, row in rows:
        names = next(pair for pair in NAMES if row.keys() >= {*pair})
        prompt, answer = (string(where, name, row[name]) for name in names)
        if names[0] == "instruction" and row.get("input"):
            prompt += "\n\n" + string(where, "input", row["input"])
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield Example(where, messages=turns, weight=weight(where, row))
