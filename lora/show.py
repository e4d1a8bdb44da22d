"""`python -m lora.render FILE`: rows as the model will read them, their targets coloured, and what a file amounts to."""

from itertools import groupby
import re
import sys
from types import SimpleNamespace

from lora.render import NO_TOKEN, render


def printable(text):
    """`text` without terminal commands and other control characters, but for line ends and tabs."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


def shown(row, tokenizer, colour):
    """The row as text: target tokens in colour (or brackets), and every label in them after the step it is for."""
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


def main(argv):
    import torch
    from transformers import AutoModel

    from lora.command_line import Parser, add_flags, set_given
    from lora.config import Config, ModelConfig
    from lora.targets import is_causal
    from lora.model import load_shape
    from lora.readers import read
    from lora.store import describe, tokenise

    parser = Parser("Rows of data files as the model will read them, what is asked of it marked, and statistics.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="data files, as for --train_data")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    config, keys = Config(ModelConfig("embedded")), ("base_model", "task", "max_length", "label_max")
    for table in (config.model, config.data):
        add_flags(parser, table, keys)
    arguments = parser.parse_args(argv)
    set_given(config, arguments, keys)
    examples = read(arguments.files, config.model.task, config.data)
    shape, _, tokenizer = load_shape(config.model.base_model)
    with torch.device("meta"):  # what the model sees of a row is in its code; no weights are needed
        causal = is_causal(AutoModel.from_config(shape))
    _, facts = tokenise(examples, SimpleNamespace(tokenizer=tokenizer, causal=causal), config, "data")
    for example in examples[: arguments.rows]:
        (rendered,) = render([example], tokenizer, config.model.task, config.data, causal)
        for row in rendered.rows[: arguments.rows]:
            print(f"--- {example.where}, {len(row.tokens)} tokens")
            print(shown(row, tokenizer, sys.stdout.isatty()).rstrip("\n"))
    print(f"\n{describe('data', facts)}")
