"""A row as text, its targets marked."""

import math

from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.printable_text import printable
from lora.data.tokenise import NO_TOKEN, Row


def row_as_text(row: Row, tokenizer: Tokenizer, colour: bool) -> str:
    """Return the row as text, with target tokens or labels in green if `colour`, or in brackets."""
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    parts = []
    start = 0
    if isinstance(row.targets[0], float):  # of a step scorer
        for i, label in enumerate(row.targets):
            if not math.isnan(label):
                text = printable(tokenizer.decode(row.tokens[start : i + 1])).rstrip("\n")
                parts.append(f"{text} {begin}{label:g}{end}\n")
                start = i + 1
        return "".join(parts) + printable(tokenizer.decode(row.tokens[start:]))

    # A target stands at the position that predicts it, one before its token.
    is_target = [False]
    is_target.extend(target != NO_TOKEN for target in row.targets[:-1])
    for i in range(1, len(row.tokens) + 1):
        if i == len(row.tokens) or is_target[i] != is_target[start]:
            text = printable(tokenizer.decode(row.tokens[start:i]))
            parts.append(f"{begin}{text}{end}" if is_target[start] else text)
            start = i
    return "".join(parts)
