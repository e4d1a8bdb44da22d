"""Example -> tokens and targets: what the model reads, and what it learns at which position.

    python -m lora render FILE --base_model M        shows rows with their targets, and statistics

`targets[i]` is what the head must predict from the hidden state at position i: the next token, or
the label of the step that ends there. A position without a target has NO_TOKEN or NaN.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
import math

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from lora.common.errors import UserError
from lora.config.schema import DataConfig
from lora.data.assistant_mask import chat_pieces
from lora.data.chat_template import Piece, Span, WeightedSpan, bos_tokens
from lora.data.examples import Example

NO_TOKEN = -100
NO_SCORE = float("nan")
# Characters of a text that are tokenised at once: few enough that memory stays small, and enough
# that the tokenizer's threads have work.
MAX_PIECE_LENGTH = 2**20
# The tokens of a piece, and the factor of the loss of each; 0 outside of its spans.
Encoded = tuple[list[int], list[float]]


@dataclass(slots=True)
class Row:
    """One sequence for the model. Batch sizes and epochs are counted in rows."""

    tokens: list[int]
    targets: list[int] | list[float]  # as long as tokens
    token_type_ids: list[int] | None = None  # of an encoder's pair of texts
    target_weights: list[float] | None = None  # factor of the loss at each position
    loss_weight: float = 1.0  # the example's weight, which multiplies all of these


@dataclass(slots=True)
class TokenisedExample:
    """The rows of an example, and whether something of it was left out."""

    rows: list[Row] = field(default_factory=list)
    cut: bool = False
    unprinted: Counter[str] = field(default_factory=Counter)  # by the chat template


def tokenise(
    examples: Sequence[Example], tokenizer: Tokenizer, task: str, data: DataConfig, causal: bool
) -> list[TokenisedExample]:
    """Turn examples, of the task "lm" or "score", into rows of at most max_length tokens.

    A longer text becomes several windows, in which every token but the first is a target exactly
    once. A chat is cut off at its end. The steps of a chain that do not fit are left out. A causal
    model reads a chain in one row. An encoder also sees later text, so each labelled step gets a
    row of its own, which ends with that step. A result has no rows where no target fits.
    """
    if task == "lm":
        results = tokenise_texts(examples, tokenizer, data.max_length)
    elif causal:
        results = tokenise_chains(examples, tokenizer, data)
    else:
        chosen = (data.prompt_format, data.step_format, data.step_marker)
        if chosen != (DataConfig.prompt_format, DataConfig.step_format, DataConfig.step_marker):
            keys = "prompt_format, step_format, step_marker"
            raise UserError(f"{keys}: an encoder reads a pair of texts; leave them out.")
        results = [tokenise_pairs(example, tokenizer, data.max_length) for example in examples]
    for example, result in zip(examples, results):
        for row in result.rows:
            row.loss_weight = example.weight
    return results


def tokenise_texts(
    examples: Sequence[Example], tokenizer: Tokenizer, max_length: int
) -> list[TokenisedExample]:
    pieces = []
    unprinted_parts = []
    for example in examples:
        unprinted: Counter[str] = Counter()
        if example.messages:
            example_pieces, unprinted = chat_pieces(example, tokenizer)
        else:
            example_pieces = [Piece(text) for text in split_text(example.text)]
        pieces.append(example_pieces)
        unprinted_parts.append(unprinted)
    bos = bos_tokens(tokenizer)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    results = []
    encoded_examples = encode_groups(pieces, tokenizer)
    for example, encoded, unprinted in zip(examples, encoded_examples, unprinted_parts):
        tokens, weights = [], []
        for piece_tokens, piece_weights in encoded:
            tokens.extend(piece_tokens)
            weights.extend(piece_weights)
        if example.messages:
            result = chat_row(tokens, weights, max_length)
            result.unprinted = unprinted
            results.append(result)
            continue
        prefix = [] if tokens[:1] == bos else bos
        suffix = [] if tokens[-1:] == eos else eos
        results.append(text_rows(prefix + tokens + suffix, max_length))
    return results


def tokenise_chains(
    examples: Sequence[Example], tokenizer: Tokenizer, data: DataConfig
) -> list[TokenisedExample]:
    bos = bos_tokens(tokenizer)
    marker = marker_tokens(data, tokenizer)
    pieces = [chain_pieces(example, data, tokenizer) for example in examples]
    results = []
    for example, encoded in zip(examples, encode_groups(pieces, tokenizer)):
        prompt, *steps = [tokens for tokens, _ in encoded]
        steps = [step + marker for step in steps]
        prefix = [] if prompt[:1] == bos else bos
        results.append(chain_row(prefix + prompt, steps, example.labels, data.max_length))
    return results


def chain_pieces(example: Example, data: DataConfig, tokenizer: Tokenizer) -> list[Piece]:
    """Return the prompt and the steps, each as a piece so that a step's last token is its own."""
    # A step's piece ends at the marker, so what step_format has after it begins the next piece.
    before_marker, _, after_marker = data.step_format.partition("{marker}")
    prompt_format = data.prompt_format.replace("{bos}", tokenizer.bos_token or "")
    pieces = [Piece(prompt_format.replace("{prompt}", example.prompt))]
    for number, step in enumerate(example.steps, 1):
        line = before_marker.replace("{number}", str(number)).replace("{step}", step)
        pieces.append(Piece(line if number == 1 else after_marker + line))
    return pieces


def split_text(text: str) -> Iterator[str]:
    """Split a text into parts of at most MAX_PIECE_LENGTH, at ends of lines where possible."""
    start = 0
    while len(text) - start > MAX_PIECE_LENGTH:
        line_end = text.rfind("\n", start, start + MAX_PIECE_LENGTH)
        end = start + MAX_PIECE_LENGTH if line_end < 0 else line_end + 1
        yield text[start:end]
        start = end
    yield text[start:]


def marker_tokens(data: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """Return [the token that follows every step], or [] where there is no step_marker."""
    marker = data.step_marker
    if not marker:
        return []
    tokens = tokenizer(marker, add_special_tokens=False).input_ids
    if len(tokens) > 1:
        expected = f"expected one; add --add_special_tokens {marker!r}"
        raise UserError(f"step_marker {marker!r} is {len(tokens)} tokens, {expected}.")
    return tokens


def encode_groups(groups: list[list[Piece]], tokenizer: Tokenizer) -> list[list[Encoded]]:
    """Tokenise the pieces of many examples in one call, which the tokenizer's threads share."""
    pieces = []
    for group in groups:
        pieces.extend(group)
    encoded = encode(pieces, tokenizer)
    results = []
    start = 0
    for group in groups:
        results.append(encoded[start : start + len(group)])
        start += len(group)
    return results


def encode(pieces: list[Piece], tokenizer: Tokenizer) -> list[Encoded]:
    results: list[Encoded] = [([], [])] * len(pieces)
    for literal in (False, True):
        indices = [i for i, piece in enumerate(pieces) if piece.literal == literal]
        if not indices:
            continue
        batch = tokenizer(
            [pieces[i].text for i in indices],
            add_special_tokens=False,
            split_special_tokens=literal,
            return_offsets_mapping=any(pieces[i].spans for i in indices),
            verbose=False,
        )
        for row, i in enumerate(indices):
            tokens = batch.input_ids[row]
            weights = [0.0] * len(tokens)
            if pieces[i].spans:
                weights = span_weights(batch.offset_mapping[row], pieces[i].spans)
            results[i] = (tokens, weights)
    return results


def span_weights(offsets: list[Span], spans: list[WeightedSpan]) -> list[float]:
    """Return the weight of the span that each token lies in, at least in part; 0 in none.

    `offsets` are the characters of each token.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    # In Llama 3 the offsets of spaces are empty; such a token begins where the last one ended.
    previous_ends = np.concatenate(([0], ends[:-1]))
    starts = np.where(starts < ends, starts, previous_ends)
    weights = np.zeros(len(offsets))
    for span_start, span_end, weight in spans:
        inside = np.flatnonzero((starts < span_end) & (ends > span_start))
        if len(inside):
            # The offsets of some tokenizers leave spaces out, so all tokens in between count.
            weights[inside[0] : inside[-1] + 1] = weight
    return weights.tolist()


def chat_row(tokens: list[int], weights: list[float], max_length: int) -> TokenisedExample:
    """Write a chat in one row, cut off at its end; the targets are the tokens with a weight."""
    weights = weights[1:max_length]
    targets = []
    for next_token, weight in zip(tokens[1:max_length], weights):
        targets.append(next_token if weight else NO_TOKEN)
    targets.append(NO_TOKEN)
    result = TokenisedExample(cut=len(tokens) > max_length)
    if any(weights):
        result.rows.append(Row(tokens[:max_length], targets, target_weights=[*weights, 0.0]))
    return result


def text_rows(tokens: list[int], max_length: int) -> TokenisedExample:
    """Write a text in windows; the first target of a window is its second token."""
    result = TokenisedExample()
    for start in range(0, len(tokens) - 1, max_length):
        window = tokens[start : start + max_length]
        targets = tokens[start + 1 : start + max_length + 1]
        targets += [NO_TOKEN] * (len(window) - len(targets))
        result.rows.append(Row(window, targets))
    return result


def chain_row(
    prompt: list[int], steps: list[list[int]], labels: list[float | None], max_length: int
) -> TokenisedExample:
    """Write a chain in one row, with each label at the last token of its step."""
    tokens = list(prompt)
    targets = [NO_SCORE] * len(tokens)
    result = TokenisedExample()
    for step, label in zip(steps, labels):
        # A step that tokenises to nothing has no position for its label. It and later ones are left
        # out.
        if not step or len(tokens) + len(step) > max_length:
            result.cut = True
            break
        tokens += step
        targets += [NO_SCORE] * (len(step) - 1)
        targets.append(NO_SCORE if label is None else label)
    if not all(math.isnan(target) for target in targets):
        result.rows.append(Row(tokens, targets))
    return result


def tokenise_pairs(example: Example, tokenizer: Tokenizer, max_length: int) -> TokenisedExample:
    """Write a row for each labelled step: the prompt, and the steps up to this one."""
    result = TokenisedExample()
    for count, label in enumerate(example.labels, 1):
        if label is None:
            continue
        pair = tokenizer(example.prompt, "\n".join(example.steps[:count]))
        if len(pair.input_ids) > max_length:
            result.cut = True
            continue
        targets = [NO_SCORE] * (len(pair.input_ids) - 1) + [label]
        result.rows.append(Row(pair.input_ids, targets, pair.get("token_type_ids")))
    return result
