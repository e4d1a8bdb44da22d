"""Example -> tokens and targets: what the model reads, and at which positions it is asked for what.

    python -m lora.render FILE --base_model M        shows rows with their targets coloured, and what the file amounts to

`targets[i]` is what the head must say from the hidden state at position i: the next token (language modelling), or the
label of the step that ends there (scores). Where nothing is asked it is NO_TOKEN or NaN.
"""

from dataclasses import dataclass, field
from itertools import groupby
import re
import sys
from types import SimpleNamespace

from lora.chat import Piece, chat_pieces
from lora.config import DataConfig
from lora.errors import UserError, one_line_errors

NO_TOKEN = -100
NO_SCORE = float("nan")
LONGEST_PIECE = 2**20  # characters of a text that are tokenised at once: memory stays small, and the threads have work


@dataclass(slots=True)
class Row:
    """One sequence for the model; the unit that batches and passes over the data count."""

    tokens: list[int]
    targets: list[int] | list[float]  # as long as tokens
    segments: list[int] | None = None  # token types of an encoder's pair of texts
    weight: float = 1.0  # of its losses


@dataclass(slots=True)
class Rendered:
    """What became of an example: its rows, and whether max_length cut something off."""

    rows: list[Row] = field(default_factory=list)
    cut: bool = False


def render(examples, tokenizer, task, data, causal):
    """A Rendered for each example, with rows of at most max_length tokens; none where nothing that is asked fits.

    A text longer than that becomes several windows, in which every token but the first is a target exactly once. A
    chat is cut at its end. Of a chain, the steps that do not fit are left out. A causal model reads a chain in one
    row; an encoder sees what follows a step as well, so there each step is the end of a row of its own.
    `data` is the [data] table of the configuration: max_length, and how a chain is written. Raises UserError.
    """
    if task == "score" and not causal:
        plain = DataConfig.prompt_format, DataConfig.step_format, DataConfig.step_marker
        if (data.prompt_format, data.step_format, data.step_marker) != plain:
            raise UserError("prompt_format, step_format, step_marker: an encoder reads a pair of texts; leave them out.")
        results = [pair_rows(example, tokenizer, data.max_length) for example in examples]
    else:
        results = one_way_rows(examples, tokenizer, task, data)
    for example, rendered in zip(examples, results):
        for row in rendered.rows:
            row.weight = example.weight
    return results


def one_way_rows(examples, tokenizer, task, data):
    """`render` for a model that reads from left to right."""
    max_length = data.max_length
    pieces = [pieces_of(example, tokenizer, task, data) for example in examples]
    marker = marker_token(data, tokenizer) if task == "score" else []
    encoded = iter(encode([piece for parts in pieces for piece in parts], tokenizer))
    start, end = first_token(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    results = []
    for example, parts in zip(examples, pieces):
        tokenised = [(piece, *next(encoded)) for piece in parts]  # (piece, tokens, which of them are targets)
        if task == "score":
            results.append(chain_row(tokenised, start, max_length, marker))
        elif example.messages:
            results.append(chat_row(tokenised, max_length))
        else:
            results.append(text_rows(tokenised, start, end, max_length))
    return results


def pieces_of(example, tokenizer, task, data):
    """The stretches of an example that are tokenised by themselves."""
    if task == "score":  # a line each, so that a step's last token is its own
        before, _, after = data.step_format.partition("{marker}")
        lines, rest = [Piece(data.prompt_format.replace("{prompt}", example.prompt))], ""
        for number, (step, label) in enumerate(zip(example.steps, example.labels), 1):
            lines.append(Piece(rest + before.replace("{number}", str(number)).replace("{step}", step)))
            lines[-1].label, rest = label, after
        return lines
    if example.messages:
        return chat_pieces(example.where, example.messages, example.tools, tokenizer)
    return [Piece(text) for text in stretches(example.text)]


def stretches(text):
    """`text` in parts of about LONGEST_PIECE characters that begin after a line's end, where there is one."""
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = text.rfind("\n", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def first_token(tokenizer):
    """[BOS] where the tokenizer begins its texts with one, else []."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode(pieces, tokenizer):
    """[(tokens, which of them are targets)] of pieces: a token is one if it lies in a span, or shares a letter with it."""
    results = []
    for literal in (False, True):
        chosen = [(i, piece) for i, piece in enumerate(pieces) if piece.literal == literal]
        if not chosen:
            continue
        texts = [piece.text for _, piece in chosen]
        spanned = any(piece.spans for _, piece in chosen)
        out = tokenizer(
            texts, add_special_tokens=False, split_special_tokens=literal, return_offsets_mapping=spanned, verbose=False
        )
        for row, (i, piece) in enumerate(chosen):
            tokens, mask = out.input_ids[row], [False] * len(out.input_ids[row])
            offsets = out.offset_mapping[row] if piece.spans else []
            # Llama 3 has blanks end where they begin: such a token reaches back to the one before it.
            starts = [a if a < b else before for (a, b), (_, before) in zip(offsets, [(0, 0), *offsets])]
            for first, last in piece.spans:
                inside = [k for k, (_, b) in enumerate(offsets) if starts[k] < last and b > first]
                if inside:  # all between the ends: the offsets of some tokenizers leave blanks out
                    mask[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
            results.append((i, tokens, mask))
    return [(tokens, mask) for _, tokens, mask in sorted(results)]


def chat_row(tokenised, max_length):
    """The chat in one row, cut at its end; the targets are the assistant's tokens."""
    tokens = [token for _, part, _ in tokenised for token in part]
    asked = [flag for _, _, mask in tokenised for flag in mask]
    targets = [token if flag else NO_TOKEN for token, flag in zip(tokens[1:max_length], asked[1:max_length])] + [NO_TOKEN]
    row = Row(tokens[:max_length], targets)
    has_target = any(target != NO_TOKEN for target in targets)
    return Rendered([row] if has_target else [], cut=len(tokens) > max_length)


def text_rows(tokenised, start, end, max_length):
    tokens = [token for _, part, _ in tokenised for token in part]
    tokens = (start if tokens[:1] != start else []) + tokens + (end if tokens[-1:] != end else [])
    rows = []
    for first in range(0, len(tokens) - 1, max_length):
        window = tokens[first : first + max_length]
        targets = tokens[first + 1 : first + max_length + 1]
        rows.append(Row(window, targets + [NO_TOKEN] * (len(window) - len(targets))))
    return Rendered(rows)


def marker_token(data, tokenizer):
    """[the token that follows every step], or [] where there is no step_marker. Raises UserError."""
    tokens = tokenizer(data.step_marker, add_special_tokens=False).input_ids if data.step_marker else []
    if len(tokens) > 1:
        name = data.step_marker
        raise UserError(f"step_marker {name!r} is {len(tokens)} tokens, need one; add --add_special_tokens {name!r}.")
    return tokens


def chain_row(tokenised, start, max_length, marker):
    """Prompt and steps in one row, with the labels at the last tokens of the steps, or at the marker after each."""
    tokens = start + tokenised[0][1]
    targets = [NO_SCORE] * len(tokens)
    cut = False
    for piece, line, _ in tokenised[1:]:
        line = line + marker
        cut = cut or not line or len(tokens) + len(line) > max_length  # some tokenizers have no token for some steps
        if not cut:
            tokens += line
            targets += [NO_SCORE] * (len(line) - 1) + [NO_SCORE if piece.label is None else piece.label]
    has_target = any(target == target for target in targets)
    return Rendered([Row(tokens, targets)] if has_target else [], cut)


def pair_rows(example, tokenizer, max_length):
    """For each labelled step: the prompt and everything up to that step, as the encoder's pair of texts."""
    result = Rendered()
    for end, label in enumerate(example.labels, 1):
        if label is None:
            continue
        pair = tokenizer(example.prompt, "\n".join(example.steps[:end]))
        if len(pair.input_ids) <= max_length:
            targets = [NO_SCORE] * (len(pair.input_ids) - 1) + [label]
            result.rows.append(Row(pair.input_ids, targets, pair.get("token_type_ids")))
        else:
            result.cut = True
    return result


# ------------------------------------------------------------------------------------------- python -m lora.render FILE


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

    from lora.command_line import Parser
    from lora.config import Config, set_key
    from lora.targets import is_causal
    from lora.model import load_shape
    from lora.readers import read
    from lora.store import describe, tokenise

    parser = Parser("Rows of data files as the model will read them, what is asked of it marked, and statistics.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="data files, as for --train_data")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: 3)")
    for name, default in (("base_model", "embedded"), ("task", "lm"), ("max_length", "2048"), ("label_max", "1")):
        parser.add_argument(f"--{name}", default=default, metavar="X", help=f"as in train.py (default: {default})")
    arguments = parser.parse_args(argv)
    config = Config()
    for name in ("base_model", "task", "max_length", "label_max"):
        set_key(config, name, getattr(arguments, name), f"--{name}", from_text=True)
    examples = read(arguments.files, config.model.task, config.data)
    shape, _, tokenizer = load_shape(config.model.base_model)
    with torch.device("meta"):  # what the model sees of a row is in its code; no weights are needed
        causal = is_causal(AutoModel.from_config(shape))
    rows, facts = tokenise(examples, SimpleNamespace(tokenizer=tokenizer, causal=causal), config, "data")
    for example in examples[: arguments.rows]:
        (rendered,) = render([example], tokenizer, config.model.task, config.data, causal)
        for row in rendered.rows[: arguments.rows]:
            print(f"--- {example.where}, {len(row.tokens)} tokens")
            print(shown(row, tokenizer, sys.stdout.isatty()).rstrip("\n"))
    print(f"\n{describe('data', facts)}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
