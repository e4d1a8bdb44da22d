"""{"messages": [{"role", "content"}, ...]}, maybe with "tools" and "system": a chat.

The words of other tools for it (ShareGPT's, OpenAI's) are read by chat_dialects.py.

A message of the assistant may say whether or how much it is learned, in the words of several
libraries: "weight" or "loss_weight" (a number), "train" or "training" (true or false).
"""

import json
from typing import Any

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import (
    BLANK,
    Example,
    Examples,
    is_blank,
    read_weight,
    refuse_other_training,
    require_text,
)

TASK = "lm"
FORMS = ({"messages"}, {"conversations"}, {"conversation"})
OPTIONAL = {"system", "system_prompt", "tools", "functions", "weight"}
ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM = ("system", "system_prompt")  # keys beside the messages
NUMBERS = ("weight", "loss_weight")  # switches of a message
BOOLEANS = ("train", "training")


def examples(where: str, row: dict, data: DataConfig) -> Examples:
    from lora.data.readers.chat_dialects import in_our_words

    refuse_other_training(where, row)
    row = in_our_words(where, row)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        found = f"messages is {str(messages)[:40]!r}"
        raise UserError(f"{where}: {found}; expected objects with role and content.")
    messages = with_system(where, row, messages)
    messages = [checked(where, i, message) for i, message in enumerate(messages, 1)]
    if messages[-1]["role"] != "assistant" and row.get("chosen") and row.get("rejected"):
        problem = "chosen and rejected answers beside a conversation: a preference row (DPO)"
        raise UserError(f"{where}: {problem}; take other rows.")
    if all(message["role"] != "assistant" for message in messages):
        problem = "no message has role assistant, so there is nothing to learn"
        raise UserError(f"{where}: {problem}.")
    if any(lacks_content(message) for message in messages):
        yield BLANK
        return
    tools = row.get("tools") or None
    # The characters of tool calls and reasoning are checked as well.
    require_text(where, "the chat", json.dumps([messages, tools], ensure_ascii=False))
    weights = [message_weight(where, i, message) for i, message in enumerate(messages, 1)]
    for message in messages:
        for switch in (*NUMBERS, *BOOLEANS):
            message.pop(switch, None)  # nothing for the chat template
    yield Example(
        where,
        messages=messages,
        message_weights=[] if set(weights) == {1.0} else weights,
        tools=tools,
        weight=read_weight(where, row),
    )


def with_system(where: str, row: dict, messages: list) -> list:
    """Put a system prompt that stands beside the messages, as Anthropic's, in front of them."""
    prompts = [row[name] for name in SYSTEM if not is_blank(row.get(name))]
    if not prompts:
        return messages
    system = require_text(where, "system", prompts[0])
    if prompts[-1] != system:
        raise UserError(f"{where}: {' and '.join(SYSTEM)} differ; keep one.")
    first = {"role": "system", "content": system}
    if not isinstance(messages[0], dict) or messages[0].get("role") != "system":
        return [first, *messages]
    if messages[0].get("content") != system:
        problem = "system and the first message, of role system, differ"
        raise UserError(f"{where}: {problem}; keep one.")
    return messages


def checked(where: str, number: int, message: Any) -> dict:
    """Return a copy of the message with a text as its content, or "" in the place of none."""
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        expected = f"expected one of {', '.join(ROLES)}"
        raise UserError(f"{where}: message {number} has role {role!r}; {expected}.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(is_call(call) for call in calls):
        problem = f"tool_calls of message {number}"
        raise UserError(f"{where}: {problem}: expected a list of objects, each with its name.")
    content = message.get("content")
    if is_blank(content):
        content = content or ""
    else:
        require_text(where, f"content of message {number}", content)
    return {**message, "content": content}


def lacks_content(message: dict) -> bool:
    """Return whether a message says nothing. A tool may; a tool call needs no words."""
    return (
        is_blank(message["content"]) and message["role"] != "tool" and not message.get("tool_calls")
    )


def message_weight(where: str, number: int, message: dict) -> float:
    """Return the factor of the losses of a message's targets, by its switches."""
    numbers = {}
    for key in NUMBERS:
        if message.get(key) is not None:
            numbers[key] = read_weight(where, message, key)
    booleans = {}
    for key in BOOLEANS:
        value = message.get(key)
        if value is not None and not isinstance(value, bool):
            problem = f"{key} of message {number} is {value!r}"
            raise UserError(f"{where}: {problem}; expected true or false.")
        if value is not None:
            booleans[key] = value
    trained = {key: value > 0 for key, value in numbers.items()}
    trained.update(booleans)
    is_trained = set(trained.values())
    if len(is_trained) > 1 or len(set(numbers.values())) > 1:
        switches = " and ".join([*numbers, *booleans])
        raise UserError(f"{where}: {switches} of message {number} disagree; keep one.")
    if message["role"] != "assistant":
        if True in booleans.values():
            problem = f"message {number} ({message['role']}) is to be trained"
            switches = " and ".join(booleans)
            raise UserError(f"{where}: {problem}, but only the assistant's are; remove {switches}.")
        return 1.0
    if False in is_trained:
        return 0.0
    return next(iter(numbers.values()), 1.0)


def is_call(call: Any) -> bool:
    """Return whether this is {"function": {"name", ...}} or {"name", ...}."""
    if isinstance(call, dict):
        call = call.get("function") or call
    return isinstance(call, dict) and isinstance(call.get("name"), str)
