"""Example -> tokens and targets: what the model reads, and at which positions it is asked for what.

`targets[i]` is what the head must say from the hidden state at position i: the next token (language modelling), or the
label of the step that ends there (scores). Where nothing is asked it is NO_TOKEN or NaN.
"""

from dataclasses import dataclass

NO_TOKEN = -100
NO_SCORE = float("nan")


@dataclass(slots=True)
class Row:
    """One sequence for the model; the unit that batches and passes over the data count."""

    tokens: list[int]
    targets: list[int] | list[float]  # as long as tokens
    segments: list[int] | None = None  # token types of an encoder's pair of texts


def render(example, tokenizer, task, max_length, causal):
    """The rows of an example, each at most `max_length` tokens long; none where no labelled step fits.

    A text longer than that becomes several windows, in which every token but the first is a target exactly once. Of
    a chain, the steps that do not fit are left out. A causal model reads a chain in one row; an encoder sees what
    follows a step as well, so there each step is the end of a row of its own.
    """
    if task == "lm":
        return text_rows(example, tokenizer, max_length)
    return chain_rows(example, tokenizer, max_length) if causal else pair_rows(example, tokenizer, max_length)


def first_token(tokenizer):
    """[BOS] where the tokenizer begins its texts with one, else []."""
    ids = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def text_rows(example, tokenizer, max_length):
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = first_token(tokenizer) + encode(tokenizer, example.text) + end
    rows = []
    for start in range(0, len(tokens) - 1, max_length):
        window = tokens[start : start + max_length]
        targets = tokens[start + 1 : start + max_length + 1]
        rows.append(Row(window, targets + [NO_TOKEN] * (len(window) - len(targets))))
    return rows


def chain_rows(example, tokenizer, max_length):
    """Prompt and steps, a line each. Every line is tokenised by itself, so that a step's last token is its own."""
    tokens = first_token(tokenizer) + encode(tokenizer, example.prompt + "\n")
    targets = [NO_SCORE] * len(tokens)
    for step, label in zip(example.steps, example.labels):
        line = encode(tokenizer, step + "\n")
        if len(tokens) + len(line) > max_length:
            break
        tokens += line
        targets += [NO_SCORE] * (len(line) - 1) + [NO_SCORE if label is None else label]
    return [Row(tokens, targets)] if any(t == t for t in targets) else []


def pair_rows(example, tokenizer, max_length):
    """For each labelled step: the prompt and everything up to that step, as the encoder's pair of texts."""
    rows = []
    for end, label in enumerate(example.labels, 1):
        if label is None:
            continue
        pair = tokenizer(example.prompt, "\n".join(example.steps[:end]))
        if len(pair.input_ids) <= max_length:
            targets = [NO_SCORE] * (len(pair.input_ids) - 1) + [label]
            rows.append(Row(pair.input_ids, targets, pair.get("token_type_ids")))
    return rows
