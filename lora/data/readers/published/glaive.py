"""glaive-function-calling-v2: {"system", "chat"}, a chat with calls of functions in one text.

    USER: a question   ASSISTANT: <functioncall> {...} <|endoftext|>   FUNCTION RESPONSE: {...}

The functions stand in the system prompt, and a call stays the text that the assistant writes.
"""

import re

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Examples, is_blank, require_text
from lora.data.readers import chat

TASK = "lm"
FORMS = ({"system", "chat"},)
OPTIONAL: set[str] = set()
SPEAKERS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
TURN = re.compile(rf"^\s*({'|'.join(SPEAKERS)}): ?", re.MULTILINE)


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    before, *turns = TURN.split(require_text(where, "chat", row["chat"]))
    if before.strip() or not turns:
        raise UserError(f"{where}: chat is {row['chat'][:40]!r}; expected USER: at its start.")
    messages = []
    for speaker, text in zip(turns[::2], turns[1::2]):
        content = text.strip().removesuffix("<|endoftext|>").strip()
        messages.append({"role": SPEAKERS[speaker], "content": content})
    system = "" if is_blank(row["system"]) else require_text(where, "system", row["system"])
    system = system.removeprefix("SYSTEM:").strip()
    yield from chat.examples(where, {"messages": messages, "system": system}, data)
