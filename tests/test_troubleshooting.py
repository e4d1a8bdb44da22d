"""Every message that docs/troubleshooting.md quotes is one that the code can print."""

import ast
from pathlib import Path
import re

import transformers

from lora.common.paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Of a base on the Hub, transformers' own messages are printed.
HUB = Path(transformers.__file__).parent / "utils" / "hub.py"


def quoted_messages() -> list[str]:
    """Return the messages in the first column of the tables that are headed "message"."""
    messages: list[str] = []
    for table in re.findall(r"^\| message \|.*\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE):
        for line in table.splitlines():
            messages += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return messages


def texts_of_the_code() -> str:
    """Return all strings of the sources; of an f-string its constant parts."""
    files = [*ROOT.glob("*.py"), *(ROOT / "lora").rglob("*.py"), HUB]
    nodes: list[ast.AST] = []
    for file in files:
        nodes.extend(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
    return "\n".join(value for value in constants if isinstance(value, str))


def test_every_quoted_message_stands_in_the_code():
    messages, code = quoted_messages(), texts_of_the_code()
    assert len(messages) > 50
    missing = []
    for message in messages:
        parts = [part for part in message.split("...") if part.strip()]
        if not all(part in code for part in parts):
            missing.append(message)
    assert not missing
