"""The arguments of tool calls in the form that a chat template prints."""

import json
from typing import Any

from lora.common.errors import UserError


def with_printable_arguments(chat: Any, messages: list[dict]) -> list[dict]:
    """Return messages with the arguments of calls as JSON texts, if the template needs that.

    Most templates turn an object into JSON. Some want a text, and fail or print Python's form.
    """
    as_texts = []
    python_forms = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            if isinstance(function.get("arguments"), dict):
                python_forms.append(str(function["arguments"]))
                text = json.dumps(function["arguments"], ensure_ascii=False)
                function = {**function, "arguments": text}
            calls.append({**call, "function": function} if "function" in call else function)
        as_texts.append({**message, "tool_calls": calls} if calls else message)
    written = json.dumps(messages, ensure_ascii=False)
    try:
        text = chat.render(chat.with_stand_ins(messages))
    except UserError:
        return as_texts
    for form in python_forms:
        if form != "{}" and text.count(form) > written.count(form):
            return as_texts
    return messages
