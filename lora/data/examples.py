"""One example of a data set, and the checks of its parts that all readers share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
import json
import re
from typing import Any

from lora.common.errors import UserError

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # the names that data sets use
# The keys of a message, without the switches that readers take out of it.
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING_KEYS)


@dataclass(slots=True)
class Example:
    """One row of a data set: a text, a chat, or a prompt with steps and a label for each step."""

    where: str  # file:line, for messages to the user
    text: str = ""
    messages: list[dict] = field(default_factory=list)  # {"role", "content", ...}
    message_weights: list[float] = field(default_factory=list)  # of each message; empty: all 1
    tools: list[dict] | None = None  # what the chat template is given about tools
    prompt: str = ""
    steps: list[str] = field(default_factory=list)
    labels: list[float | None] = field(default_factory=list)  # 0..1, or None without a label
    outcome: bool | None = None  # whether the solution's answer is right, where that is known
    weight: float = 1.0  # factor of the losses of its targets
    terms: str = ""  # why it may not be trained on
    category: str = ""  # eval.py also gives the means of each
    dataset_id: int = 0  # number of the path that it was read from

    @property
    def subject(self) -> str:
        """The text by which examples are split: a prompt, or a chat up to its first answer."""
        if not self.messages:
            return self.prompt or self.text
        after_user = False
        for i, message in enumerate(self.messages):
            if after_user and message["role"] == "assistant":
                return as_subject(self.messages[:i])
            after_user = after_user or message["role"] == "user"
        return as_subject(self.messages)


def as_subject(messages: list[dict]) -> str:
    """Return messages as one text, in which other keys and the order of keys make no difference."""
    kept = []
    for message in messages:
        values = {key: message[key] for key in MESSAGE_KEYS if message.get(key)}
        kept.append({"role": message["role"], "content": message["content"], **values})
    return json.dumps(kept)


SourceRows = Iterable[tuple[str, dict[str, Any]]]  # file:line, and the row
Examples = Iterator[Example | str]  # a text says why a row is left out
BLANK = "a blank message"
# float() would also read 1_6, Arabic digits and "nan"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def require_text(where: str, name: str, value: Any) -> str:
    """Return `value` if it is a text that a tokenizer can read. Raises UserError."""
    if not isinstance(value, str) or not value.strip():
        found = f"{name} is {repr(value)[:42]}"
        raise UserError(f"{where}: {found}; expected a text that is not empty.")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        problem = "contains half of a surrogate pair, which is not a character; remove it"
        raise UserError(f"{where}: {name} {problem}.")
    return value


def is_blank(text: Any) -> bool:
    return text is None or (isinstance(text, str) and not text.strip())


class Cell(str):
    """A cell of a CSV or TSV file, in which numbers are texts as well."""


def from_cell(value: Any) -> Any:
    """Return the number or the truth that a cell stands for, or None for a blank one.

    Any other value is returned as it is.
    """
    if not isinstance(value, Cell):
        return value
    text = value.strip()
    if NUMBER.fullmatch(text):
        return float(text)
    return {"": None, "true": True, "false": False}.get(text.lower(), value)


def read_weight(where: str, row: dict[str, Any], key: str = "weight") -> float:
    """Return the row's "weight", the factor of its loss; 1 where it has none. Raises UserError."""
    value = from_cell(row.get(key))
    if value is None:
        return 1.0
    if type(value) not in (int, float) or not 0 <= value < float("inf"):  # nor a boolean
        raise UserError(f"{where}: {key} {value!r}; expected a number from 0 on.")
    return float(value)


def read_category(row: dict[str, Any]) -> str:
    """Return the row's "category", by which eval.py takes means as well; "" without one."""
    value = row.get("category")
    if not isinstance(value, (str, int)):
        return ""
    return str(value).encode("utf-8", "replace").decode().strip()  # half a surrogate pair is "?"


def refuse_other_training(where: str, row: dict[str, Any]) -> None:
    """Raise UserError where a conversation comes with what this kind of training cannot use."""
    for key in ("label", "kto_tag"):
        if not is_blank(row.get(key)):
            found = f"a {key} beside a conversation (as for KTO), and every answer would be learned"
            raise UserError(f"{where}: {found}; keep the good ones and remove the key {key}.")
    for key in ("image", "images", "video", "videos", "audio"):
        if not is_blank(row.get(key)) and row[key] != []:
            raise UserError(f"{where}: {key}: only text is read; take other rows.")


def read_label(where: str, value: Any, label_max: float) -> float | None:
    """Return a label as a share of `label_max`, or None for null. Raises UserError."""
    value = from_cell(value)
    if value is None:
        return None
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)) or not 0 <= value <= label_max:
        expected = f"expected 0..{label_max:g}, true, false or null (see --label_max)"
        raise UserError(f"{where}: label {value!r}; {expected}.")
    return value / label_max
