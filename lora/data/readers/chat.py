"""{"messages": [{"role", "content"}, ...]} (and "tools"): a chat of any number of turns."""

import json

from lora.common.errors import UserError
from lora.data.examples import Example, string, weight

TASK = "lm"
FORMS = ({"messages"},)
ROLES = ("system", "developer", "user", "assistant", "tool")


def examples(rows, data):
    for where, row in rows:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise UserError(
                f"{where}: messages is {str(messages)[:40]!r}; expected objects with role and content."
            )
        for number, message in enumerate(messages, 1):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                role = message.get("role") if isinstance(message, dict) else message
                raise UserError(
                    f"{where}: message {number} has role {role!r}; expected one of {', '.join(ROLES)}."
                )
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(map(is_call, calls)):
                raise UserError(
                    f"{where}: tool_calls of message {number}: expected a list of objects, each with its name."
                )
            if not message.get("content") and message["role"] in ("assistant", "tool"):
                if message["role"] == "assistant" and not message.get("tool_calls"):
                    raise UserError(
                        f"{where}: message {number} (assistant) has neither content nor tool_calls; give one."
                    )
                messages[number - 1] = message | {"content": ""}
            else:
                string(where, f"content of message {number}", message.get("content"))
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{where}: no message has role assistant, so there is nothing to learn."
            )
        tools = row.get("tools") or None
        # Calls and reasoning too
        string(where, "the chat", json.dumps([messages, tools], ensure_ascii=False))
        yield Example(where, messages=messages, tools=tools, weight=weight(where, row))


def is_call(call):
    """Whether it is {"function": {"name", ...}} or {"name", ...}."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
