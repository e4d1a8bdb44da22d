"""A prompt and its answer under the names that public sets use: a chat of two turns.

{"prompt", "completion"}    {"question", "answer"}    {"instruction", "output", maybe an "input"}
"""

from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, SourceRows, string, weight

TASK = "lm"
NAMES = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
FORMS = tuple(set(pair) for pair in NAMES)


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        prompt_name, answer_name = next(pair for pair in NAMES if row.keys() >= set(pair))
        prompt = string(where, prompt_name, row[prompt_name])
        answer = string(where, answer_name, row[answer_name])
        if prompt_name == "instruction" and row.get("input"):
            prompt += "\n\n" + string(where, "input", row["input"])
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield Example(where, messages=turns, weight=weight(where, row))
