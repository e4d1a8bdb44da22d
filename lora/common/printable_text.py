"""Text from files, made safe to print."""

import os
import re

TERMINAL_COMMAND = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"
# Also what turns the direction of a text, and halves of characters, which cannot be written.
CONTROL_CHARACTER = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
CONTROL_CHARACTER += r"\ud800-\udfff]"


def printable(text: str) -> str:
    """Return `text` without terminal commands and control characters except newline and tab."""
    return re.sub(CONTROL_CHARACTER, "", re.sub(TERMINAL_COMMAND, "", text))


def print_on_rank_zero(text: str) -> None:
    """Print a text, made safe, in the first of the processes that torchrun has started."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text))
