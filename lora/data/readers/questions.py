"""A prompt and its answer under the names that public sets use: a chat of two turns.

{"prompt", "completion"}    {"question", "answer"}    {"instruction", "output"}

"input" and "context" follow an instruction or a question after a blank line. "system" is the
system prompt. "history" has earlier turns, [[instruction, output], ...], which are learnt as well.
"""

from typing import Any

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import (
    BLANK,
    Example,
    Examples,
    SourceRows,
    is_blank,
    refuse_other_training,
    string,
    weight,
)

TASK = "lm"
NAMES = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))
FORMS = tuple(set(pair) for pair in NAMES)
OPTIONAL = {"input", "context", "system", "history", "weight"}


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        refuse_other_training(where, row)
        prompt_name, answer_name = next(pair for pair in NAMES if row.keys() >= set(pair))
        turns = [*earlier_turns(where, row.get("history")), (row[prompt_name], row[answer_name])]
        if any(is_blank(text) for turn in turns for text in turn):
            yield BLANK
            continue
        messages = []
        if not is_blank(row.get("system")):
            messages.append(("system", string(where, "system", row["system"])))
        for prompt, answer in turns:
            messages.append(("user", string(where, prompt_name, prompt)))
            messages.append(("assistant", string(where, answer_name, answer)))
        for name in ("input", "context"):
            if not is_blank(row.get(name)):
                role, prompt = messages[-2]
                messages[-2] = role, f"{prompt}\n\n{string(where, name, row[name])}"
        chat = [{"role": role, "content": content} for role, content in messages]
        yield Example(where, messages=chat, weight=weight(where, row))


def earlier_turns(where: str, history: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of a row's "history". Raises UserError."""
    turns = history or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        found = f"history is {str(history)[:40]!r}"
        raise UserError(f"{where}: {found}; expected a list of [instruction, output].")
    return [(prompt, answer) for prompt, answer in turns]
