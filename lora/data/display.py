"""A row as text, its targets marked."""

from itertools import groupby

from lora.common.terminal import printable
from lora.data.tokenise import NO_TOKEN


def row_as_text(row, tokenizer, colour):
    """The row as text: target tokens in colour (or brackets), and every label in them after the
    step it is for.
    """
    begin, end = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    scores = [target for target in row.targets if isinstance(target, float)]
    asked = [target == target and target != NO_TOKEN for target in row.targets]
    if scores:
        runs, ends = [], [place + 1 for place, flag in enumerate(asked) if flag]
        for first, last in zip([0, *ends], ends):
            text = printable(tokenizer.decode(row.tokens[first:last])).rstrip("\n")
            runs.append(f"{text} {begin}{row.targets[last - 1]:g}{end}\n")
        return "".join(runs) + printable(tokenizer.decode(row.tokens[ends[-1] :]))
    is_target = [False, *asked[:-1]]  # the token that is predicted, not the place that predicts it
    runs = []
    for flag, places in groupby(range(len(row.tokens)), key=is_target.__getitem__):
        text = printable(tokenizer.decode([row.tokens[place] for place in places]))
        runs.append(f"{begin}{text}{end}" if flag else text)
    return "".join(runs)
