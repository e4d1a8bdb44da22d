"""{"messages": [{"role", "content"}, ...]} (and "tools"): a chat of any number of turns."""

import json
from typing import Any

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.examples import Example, Examples, SourceRows, string, weight

TASK = "lm"
FORMS = ({"messages"},)
ROLES = ("system", "developer", "user", "assistant", "tool")


def examples(rows: SourceRows, data: DataConfig) -> Examples:
    for where, row in rows:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            found = f"messages is {str(messages)[:40]!r}"
            raise UserError(f"{where}: {found}; expected objects with role and content.")
        messages = [checked(where, i, message) for i, message in enumerate(messages, 1)]
        if all(message["role"] != "assistant" for message in messages):
            problem = "no message has role assistant, so there is nothing to learn"
            raise UserError(f"{where}: {problem}.")
        tools = row.get("tools") or None
        # The characters of tool calls and reasoning are checked as well.
        string(where, "the chat", json.dumps([messages, tools], ensure_ascii=False))
        yield Example(where, messages=messages, tools=tools, weight=weight(where, row))


def checked(where: str, number: int, message: Any) -> dict:
    """Return the message with a content, which may be empty beside tool calls."""
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        expected = f"expected one of {', '.join(ROLES)}"
        raise UserError(f"{where}: message {number} has role {role!r}; {expected}.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(is_call(call) for call in calls):
        problem = f"tool_calls of message {number}"
        raise UserError(f"{where}: {problem}: expected a list of objects, each with its name.")
    if not message.get("content") and role == "assistant" and not calls:
        problem = f"message {number} (assistant) has neither content nor tool_calls"
        raise UserError(f"{where}: {problem}; give one.")
    if not message.get("content") and role in ("assistant", "tool"):
        return {**message, "content": ""}
    string(where, f"content of message {number}", message.get("content"))
    return message


def is_call(call: Any) -> bool:
    """Return whether this is {"function": {"name", ...}} or {"name", ...}."""
    if isinstance(call, dict):
        call = call.get("function") or call
    return isinstance(call, dict) and isinstance(call.get("name"), str)
