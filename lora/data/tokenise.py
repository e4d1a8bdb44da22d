"""Example -> tokens and targets: what the model reads, and at which positions it is asked for what.

    python -m lora render FILE --base_model M        shows rows with their targets coloured, and what the file amounts to

`targets[i]` is what the head must say from the hidden state at position i: the next token (language
modelling), or the label of the step that ends there (scores). Where nothing is asked it is NO_TOKEN
or NaN.
"""

from dataclasses import dataclass, field

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.chat_template import Piece, chat_pieces

NO_TOKEN = -100
NO_SCORE = float("nan")
# Characters of a text that are tokenised at once: memory stays small, and the threads have work
LONGEST_PIECE = 2**20


@dataclass(slots=True)
class Row:
    """One sequence for the model; the unit that batches and passes over the data count."""

    tokens: list[int]
    targets: list[int] | list[float]  # as long as tokens
    token_type_ids: list[int] | None = None  # token types of an encoder's pair of texts
    loss_weight: float = 1.0  # factor of its losses


@dataclass(slots=True)
class TokenisedExample:
    """What became of an example: its rows, and whether max_length cut something off."""

    rows: list[Row] = field(default_factory=list)
    cut: bool = False


def tokenise(examples, tokenizer, task, data, causal):
    """A Rendered for each example, with rows of at most max_length tokens; none where nothing that
    is asked fits.

    A text longer than that becomes several windows, in which every token but the first is a target
    exactly once. A chat is cut at its end. Of a chain, the steps that do not fit are left out. A
    causal model reads a chain in one row; an encoder sees what follows a step as well, so there
    each step is the end of a row of its own. `data` is the [data] table of the configuration:
    max_length, and how a chain is written. Raises UserError.
    """
    if task == "score" and not causal:
        plain = DataConfig.prompt_format, DataConfig.step_format, DataConfig.step_marker
        if (data.prompt_format, data.step_format, data.step_marker) != plain:
            raise UserError(
                "prompt_format, step_format, step_marker: an encoder reads a pair of texts; leave them out."
            )
        results = [pair_rows(example, tokenizer, data.max_length) for example in examples]
    else:
        results = one_way_rows(examples, tokenizer, task, data)
    for example, rendered in zip(examples, results):
        for row in rendered.rows:
            row.loss_weight = example.weight
    return results


def one_way_rows(examples, tokenizer, task, data):
    """`tokenise` for a model that reads from left to right."""
    max_length = data.max_length
    pieces = [pieces_of(example, tokenizer, task, data) for example in examples]
    marker = marker_token(data, tokenizer) if task == "score" else []
    encoded = iter(encode([piece for parts in pieces for piece in parts], tokenizer))
    start, end = (
        first_token(tokenizer),
        [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
    )
    results = []
    for example, parts in zip(examples, pieces):
        # (piece, tokens, which of them are targets)
        tokenised = [(piece, *next(encoded)) for piece in parts]
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
            lines.append(
                Piece(rest + before.replace("{number}", str(number)).replace("{step}", step))
            )
            lines[-1].label, rest = label, after
        return lines
    if example.messages:
        return chat_pieces(example.where, example.messages, example.tools, tokenizer)
    return [Piece(text) for text in stretches(example.text)]


def stretches(text):
    """`text` in parts of about LONGEST_PIECE characters that begin after a line's end, where there
    is one.
    """
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
    """[(tokens, which of them are targets)] of pieces: a token is one if it lies in a span, or
    shares a letter with it.
    """
    results = []
    for literal in (False, True):
        chosen = [(i, piece) for i, piece in enumerate(pieces) if piece.literal == literal]
        if not chosen:
            continue
        texts = [piece.text for _, piece in chosen]
        spanned = any(piece.spans for _, piece in chosen)
        out = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=spanned,
            verbose=False,
        )
        for row, (i, piece) in enumerate(chosen):
            tokens, mask = out.input_ids[row], [False] * len(out.input_ids[row])
            offsets = out.offset_mapping[row] if piece.spans else []
            # Llama 3 has blanks end where they begin: such a token reaches back to the one before
            # it.
            starts = [
                start if start < end else before
                for (start, end), (_, before) in zip(offsets, [(0, 0), *offsets])
            ]
            for first, last in piece.spans:
                inside = [
                    k for k, (_, end) in enumerate(offsets) if starts[k] < last and end > first
                ]
                if inside:  # all between the ends: the offsets of some tokenizers leave blanks out
                    mask[inside[0] : inside[-1] + 1] = [True] * (inside[-1] + 1 - inside[0])
            results.append((i, tokens, mask))
    return [(tokens, mask) for _, tokens, mask in sorted(results)]


def chat_row(tokenised, max_length):
    """The chat in one row, cut at its end; the targets are the assistant's tokens."""
    tokens = [token for _, part, _ in tokenised for token in part]
    asked = [flag for _, _, mask in tokenised for flag in mask]
    targets = [
        token if flag else NO_TOKEN
        for token, flag in zip(tokens[1:max_length], asked[1:max_length])
    ] + [NO_TOKEN]
    row = Row(tokens[:max_length], targets)
    has_target = any(target != NO_TOKEN for target in targets)
    return TokenisedExample([row] if has_target else [], cut=len(tokens) > max_length)


def text_rows(tokenised, start, end, max_length):
    tokens = [token for _, part, _ in tokenised for token in part]
    tokens = (start if tokens[:1] != start else []) + tokens + (end if tokens[-1:] != end else [])
    rows = []
    for first in range(0, len(tokens) - 1, max_length):
        window = tokens[first : first + max_length]
        targets = tokens[first + 1 : first + max_length + 1]
        rows.append(Row(window, targets + [NO_TOKEN] * (len(window) - len(targets))))
    return TokenisedExample(rows)


def marker_token(data, tokenizer):
    """[the token that follows every step], or [] where there is no step_marker. Raises UserError."""
    tokens = (
        tokenizer(data.step_marker, add_special_tokens=False).input_ids if data.step_marker else []
    )
    if len(tokens) > 1:
        name = data.step_marker
        raise UserError(
            f"step_marker {name!r} is {len(tokens)} tokens, expected one; add --add_special_tokens {name!r}."
        )
    return tokens


def chain_row(tokenised, start, max_length, marker):
    """Prompt and steps in one row, with the labels at the last tokens of the steps, or at the
    marker after each.
    """
    tokens = start + tokenised[0][1]
    targets = [NO_SCORE] * len(tokens)
    cut = False
    for piece, line, _ in tokenised[1:]:
        line = line + marker
        # Some tokenizers have no token for some steps
        cut = cut or not line or len(tokens) + len(line) > max_length
        if not cut:
            tokens += line
            targets += [NO_SCORE] * (len(line) - 1) + [
                NO_SCORE if piece.label is None else piece.label
            ]
    has_target = any(target == target for target in targets)
    return TokenisedExample([Row(tokens, targets)] if has_target else [], cut)


def pair_rows(example, tokenizer, max_length):
    """For each labelled step: the prompt and everything up to that step, as the encoder's pair of
    texts.
    """
    result = TokenisedExample()
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
