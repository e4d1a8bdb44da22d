"""A prompt and its answer under the names that public sets use: a chat of two turns.

"input" and "context" follow an instruction or a question after a blank line. "system" is the
system prompt. "history" has earlier turns, [[instruction, output], ...], which are learned as well.
"""

from itertools import chain
from typing import Any

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import BLANK, Examples, is_blank, require_text
from lora.data.readers import chat
from lora.data.readers.chat_dialects import chat_in, joined_chat

TASK = "lm"
NAMES = (  # the first pair that a row has is read
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("question", "response"),  # OpenOrca
    ("query", "response"),  # MetaMath
    ("prompt", "response"),
    ("problem", "solution"),
    ("input", "output"),
)
FORMS = tuple(set(pair) for pair in NAMES)
OPTIONAL = {"input", "context", "history", *chat.OPTIONAL}


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    pairs = [pair for pair in NAMES if row.keys() >= set(pair)]
    # Data sets that were joined have blank columns of each other.
    filled = [pair for pair in pairs if not any(is_blank(row[name]) for name in pair)]
    prompt_name, answer_name = (filled or pairs)[0]
    prompt, answer = chat_in(row[prompt_name]), row[answer_name]
    if isinstance(prompt, list):  # beside a text, an answer in JSON is what is to be learned
        answer = chat_in(answer)
    if isinstance(prompt, list) or isinstance(answer, list):
        row = {**row, prompt_name: prompt}
        yield from chat.examples(where, joined_chat(where, row, prompt, answer), data)
        return
    turns = [*earlier_turns(where, row.get("history")), (prompt, answer)]
    if any(is_blank(text) for text in chain.from_iterable(turns)):
        yield BLANK
        return
    messages = []
    for question, reply in turns:
        messages.append({"role": "user", "content": require_text(where, prompt_name, question)})
        messages.append({"role": "assistant", "content": require_text(where, answer_name, reply)})
    for name in ("input", "context"):
        if name != prompt_name and not is_blank(row.get(name)):
            messages[-2]["content"] += f"\n\n{require_text(where, name, row[name])}"
    yield from chat.examples(where, {**row, "messages": messages}, data)


def earlier_turns(where: str, history: Any) -> list[tuple[Any, Any]]:
    """Return the pairs of a row's "history". Raises UserError."""
    turns = history or []
    if not isinstance(turns, list) or not all(isinstance(t, list) and len(t) == 2 for t in turns):
        found = f"history is {str(history)[:40]!r}"
        raise UserError(f"{where}: {found}; expected a list of [instruction, output].")
    return [(prompt, answer) for prompt, answer in turns]
