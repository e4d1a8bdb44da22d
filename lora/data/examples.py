"""One example of a data set, and the checks of its parts that all readers share."""

from dataclasses import dataclass, field
import json

from lora.common.errors import UserError


@dataclass(slots=True)
class Example:
    """One row of somebody's data: a text, a chat, or a prompt with steps and a label for each of
    them.
    """

    where: str  # file:line, for messages
    text: str = ""
    messages: list[dict] = field(default_factory=list)  # {"role", "content", ...}
    tools: list[dict] | None = None  # what the chat's template is told of tools
    prompt: str = ""
    steps: list[str] = field(default_factory=list)
    # 0..1, or None: no label for this step
    labels: list[float | None] = field(default_factory=list)
    outcome: bool | None = None  # whether the solution's answer is right, where that is known
    weight: float = 1.0  # multiplies the loss of its targets
    terms: str = ""  # why it may not be trained on
    dataset_id: int = 0  # which of the paths it was read from

    @property
    def subject(self):
        """What rows must share to belong to the same side of a split: a document, or all before a
        user is answered.
        """
        if self.messages:
            roles = [message["role"] for message in self.messages]
            asked = roles.index("user") if "user" in roles else len(roles)
            return json.dumps(
                self.messages[
                    : roles.index("assistant", asked) if "assistant" in roles[asked:] else None
                ]
            )
        return self.prompt or self.text


def string(where, name, value):
    """`value` if it is a text that a tokenizer can read."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: {name} is {str(value)[:40]!r}; expected a text that is not empty."
        )
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(
            f"{where}: {name} holds half of a surrogate pair, which is no character; take it out."
        )
    return value


def weight(where, row):
    """What the row's "weight" says, by which its loss is multiplied; 1 where it has none."""
    value = row.get("weight", 1.0)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < float("inf")
    ):
        raise UserError(f"{where}: weight {value!r}; expected a number from 0 on.")
    return float(value)


def label(where, value, label_max):
    """A label as a share of `label_max`, or None for null."""
    if value is None:
        return None
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= label_max:
        raise UserError(
            f"{where}: label {value!r}; expected 0..{label_max:g}, true, false or null (see --label_max)."
        )
    return float(value) / (1.0 if isinstance(value, bool) else label_max)
