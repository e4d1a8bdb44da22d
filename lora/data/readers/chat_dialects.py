"""Chats in the words of other tools, translated into ours.

    ShareGPT            {"conversations": [{"from": "human" or "gpt", "value"}, ...]}
    OpenAI, Anthropic   a content that is a list of {"type": "text", "text"}
    OpenAI              "function_call" of a message, the role "function", "functions" beside them
    TRL                 {"prompt": [messages], "completion": [messages]}

The arguments of calls become objects and "tools" a list, where they are written as JSON in a text.
A tool without {"type": "function", "function": ...} around it gets that, as templates read it.
"""

from typing import Any

from lora.common.errors import UserError
from lora.common.toml_json import parse_json
from lora.data.examples import is_blank

THEIR_KEYS = {"from": "role", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
ROLES |= dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # the type of a part
CALLS = ("function_call", "tool_call")  # roles of a message whose content is a call, as JSON


def in_our_words(where: str, row: dict) -> dict:
    """Return a copy of a row with "messages" and "tools" as `chat` reads them. Raises UserError."""
    names = [name for name in ("messages", "conversations", "conversation") if name in row]
    given = [name for name in names if not is_blank(row[name])]
    messages = parsed(row[(given or names)[0]])
    if isinstance(messages, list):
        messages = [message_of(where, i, message) for i, message in enumerate(messages, 1)]
    tools = []
    for tool in objects(where, "tools", row) + objects(where, "functions", row):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        if is_function and tool.get("name") and not tool.get("function"):
            function = {key: value for key, value in tool.items() if key != "type"}
            tool = {"type": "function", "function": function}
        tools.append(tool)
    return {**row, "messages": messages, "tools": tools}


def objects(where: str, name: str, row: dict) -> list:
    """Return the list under a key. It, and each item, may be JSON in a text. Raises UserError."""
    items = parsed(row.get(name) or [])
    if not isinstance(items, list):
        raise UserError(f"{where}: {name} is {str(items)[:40]!r}; expected a list of objects.")
    return [parsed(item) for item in items]


def chat_in(value: Any) -> Any:
    """Return the messages that a text of JSON holds, if it holds a chat; else the value."""
    messages = parsed(value)
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        return value
    forms = ({"role", "content"}, {"from", "value"})
    is_chat = all(any(form <= each.keys() for form in forms) for each in messages)
    return messages if is_chat and messages else value


def joined_chat(where: str, row: dict, prompt: Any, answer: Any) -> dict:
    """Return a row whose "messages" are those of a prompt, which is not learned, and an answer."""
    for name in ("history", "input", "context"):
        if row.get(name) and row[name] is not prompt and not isinstance(row[name], dict):
            raise UserError(f"{where}: {name} beside a list of messages; put it into the list.")
    messages = []
    for role, part in (("user", prompt), ("assistant", answer)):
        part_messages = part if isinstance(part, list) else [{"role": role, "content": part}]
        for i, message in enumerate(part_messages, 1):
            message = message_of(where, i, message)
            is_question = isinstance(message, dict) and message.get("role") in ("user", "system")
            if role == "assistant" and i == 1 and is_question:
                found = "the answer is a list that begins with the question"
                raise UserError(f"{where}: {found}; read it alone: --columns messages=ITS_KEY.")
            if role == "user" and isinstance(message, dict) and message.get("role") == "assistant":
                message["train"] = False
            messages.append(message)
    return {**row, "messages": messages}


def message_of(where: str, number: int, message: Any) -> Any:
    """Return a message in our words. What is none is returned as it is, and refused later."""
    if not isinstance(message, dict):
        return message
    result: dict[str, Any] = {}
    for key, value in message.items():
        if value is None:  # data sets that were joined have null keys of each other
            continue
        ours = THEIR_KEYS.get(key, key)
        if ours == "role":
            value = ROLES.get(str(value), value)
        if ours in result and result[ours] != value:
            raise UserError(f"{where}: message {number} has two of {ours}, which differ; keep one.")
        result[ours] = value
    if isinstance(result.get("content"), list):
        result["content"] = text_of_parts(where, number, result["content"])
    functions = result.pop("function_call", None)
    if result.get("role") in CALLS:
        functions = parsed(result.get("content"))
        result |= {"role": "assistant", "content": ""}
    if functions:
        functions = functions if isinstance(functions, list) else [functions]
        result["tool_calls"] = [{"type": "function", "function": each} for each in functions]
    calls = parsed(result.pop("tool_calls", None))
    if calls:  # some templates look at a list of no calls as at one of several
        is_list = isinstance(calls, list)
        result["tool_calls"] = [with_arguments(call) for call in calls] if is_list else calls
    return result


def text_of_parts(where: str, number: int, parts: list) -> str:
    """Return the text of a content's parts, one after the other as chat templates print them."""
    texts = []
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS
        text = part.get("text") if is_text else part
        if not isinstance(text, str):
            problem = f"content of message {number} has the part {str(part)[:40]}"
            raise UserError(f"{where}: {problem}; only text is read, so take other rows.")
        texts.append(text)
    return "".join(texts)


def with_arguments(call: Any) -> Any:
    """Return a call, {"function": {"name", "arguments"}} or without "function", with an object."""
    if not isinstance(call, dict):
        return call
    call = dict(call)
    if call.get("function") is None:
        call.pop("function", None)
    else:
        call["function"] = with_arguments(call["function"])
    if "arguments" in call:
        call["arguments"] = parsed(call["arguments"])
    return call


def parsed(value: Any) -> Any:
    """Return what a text of JSON holds, if it holds an object or a list; else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(value)
        except (ValueError, RecursionError):
            return value
    return value
