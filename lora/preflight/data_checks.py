"""The checks of the data: targets, rows cut off, duplicates, overlap, masks, labels."""

from functools import partial
import json
import re

import numpy as np

from lora.data.batches import is_target
from lora.data.tokenise import NO_TOKEN
from lora.evaluation.generate import stop_tokens
from lora.preflight.trial import FAIL, OUR_FAULT, PASS, WARN, counted, required


def amount(trial):
    facts = trial.facts["train"]
    share = facts["targets"] / facts["tokens"]
    found = f"{facts['rows']} rows, {facts['targets']} targets, {share:.1%} of the tokens are trained on"
    little = share < 0.01 and trial.config.model.task == "lm"
    return required(not little, found, "are the answers really so short?", WARN)


def share_of(key, what, mend, trial):
    facts = trial.facts | trial.facts["train"]
    return counted(
        facts[key], facts["examples"], f"{facts[key]} of {facts['examples']} examples {what}", mend
    )


def overlap(trial):
    count, of = trial.facts["overlap"], len({example.subject for example in trial.examples[1]})
    found = f"{count} of {of} held-out prompts or texts are in the training data"
    mend = "the validation loss flatters: split by prompt, or leave --eval_data out"
    return required(not count, found, mend, FAIL if 100 * count > of else WARN)


def beginnings(trial):
    bos, rows = trial.task.tokenizer.bos_token_id, trial.rows
    if bos is None:
        return PASS, "this tokenizer has no BOS"
    first = rows.offsets[:-1][rows.seq_lens(np.arange(len(rows))) > 1]
    count = int(((rows.tokens[first] == bos) & (rows.tokens[first + 1] == bos)).sum())
    found = f"{count} of {len(rows)} rows begin with two BOS"
    return required(not count, found, "take it out of the texts, or out of the chat template")


def ends(trial):
    """Whether the last thing that is learned of an answer or a text is to stop there."""
    if trial.config.model.task == "score":
        return None
    stops = set(stop_tokens(trial.task.model, trial.task.tokenizer))
    rows = [rendered.rows[-1] for _, rendered in trial.sample if rendered.rows and not rendered.cut]
    # A line end may follow it
    asked = [[target for target in row.targets if target != NO_TOKEN][-2:] for row in rows]
    count = sum(not stops & set(last) for last in asked)
    found = f"{len(rows) - count} of {len(rows)} looked at end with a trained end token"
    mend = "the model would not learn to stop; mend eos_token or the chat template of the tokenizer"
    return counted(count, len(rows), found, mend)


def special_tokens(trial):
    """Chats take them as mere text, texts and steps as the tokens they are."""
    tokenizer = trial.task.tokenizer
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [re.escape(token) for token in sorted(added | {*tokenizer.all_special_tokens}) if token]
    if not names:
        return PASS, "this tokenizer has no special tokens"
    pattern = re.compile("|".join(names))
    written = [(example, " ".join([*texts_of(example)])) for example in trial.examples[0]]
    odd = [example for example, text in written if pattern.search(text)]
    found = f"{len(odd)} of {len(written)} examples have special tokens written in them"
    if not odd:
        return PASS, found
    read = (
        "in a chat they are read as mere text"
        if odd[0].messages
        else "they are read as the control tokens they name"
    )
    return WARN, f"{found}, {odd[0].where} first: {read}"


def texts_of(example):
    """What somebody wrote of an example."""
    yield from (example.text, example.prompt, *example.steps)
    yield from (
        message["content"]
        for message in example.messages
        if isinstance(message.get("content"), str)
    )


def mask(trial):
    """Every target is the token that comes next, all that the assistant says is one, and nothing
    that others say.
    """
    if trial.config.model.task == "score":
        return None
    rows = [row for _, rendered in trial.sample for row in rendered.rows]
    wrong = sum(
        target not in (NO_TOKEN, after)
        for row in rows
        for target, after in zip(row.targets, row.tokens[1:])
    )
    if wrong:
        return FAIL, f"{wrong} targets are not the token that follows; {OUR_FAULT}"
    lost, strange = [], []
    for example, rendered in trial.sample:
        if not example.messages or rendered.cut or not rendered.rows:
            continue
        learned = [target for row in rendered.rows for target in row.targets if target != NO_TOKEN]
        text = letters(trial.task.tokenizer.decode(learned))
        mine = [message for message in example.messages if message["role"] == "assistant"]
        others = [
            letters(message.get("content"))
            for message in example.messages
            if message["role"] != "assistant"
        ]
        if not all(letters(message.get("content")) in text for message in mine):
            lost.append(example.where)
        if any(
            len(other) >= 12 and other in text and other not in letters(mine) for other in others
        ):
            strange.append(example.where)
    if strange:
        return (
            FAIL,
            f"{len(strange)} chats train on what the user or the system says, {strange[0]} first; {OUR_FAULT}",
        )
    chats = sum(bool(example.messages) for example, _ in trial.sample)
    if lost:
        found = f"of {len(lost)} of {chats} chats an answer is not learned word for word, {lost[0]} first"
        mend = "the chat template changes or drops it: look with python -m lora render"
        return counted(len(lost), chats, found, mend)
    return (
        PASS,
        f"of {len(trial.sample)} looked at, all that is to be learned is a target, and nothing else",
    )


def letters(content):
    """A message's content without blanks and what JSON escapes; tool calls may quote what a user
    said.
    """
    return re.sub(r'\\[nt]|[\s"\\]', "", json.dumps(content, ensure_ascii=False)) if content else ""


def labels(trial):
    """The targets are the labels, in their order; and there is something to tell apart."""
    if trial.config.model.task == "lm":
        return None
    for example, rendered in trial.sample:
        kept = [label for label in example.labels if label is not None]
        asked = [target for row in rendered.rows for target in row.targets if target == target]
        if asked != kept[: len(asked)] or (len(asked) < len(kept) and not rendered.cut):
            return FAIL, f"{example.where}: targets {asked[:5]}, labels {kept[:5]}; {OUR_FAULT}"
    targets = trial.rows.targets[is_target(trial.rows.targets)]
    values, counts = np.unique(targets, return_counts=True)
    most = counts.max() / counts.sum()
    found = f"mean {targets.mean():.3f}; the commonest label, {values[counts.argmax()]:g}, is {most:.1%} of them"
    if len(values) == 1:
        return FAIL, f"{found}: there is nothing to tell apart; add steps of the other kind"
    return required(most <= 0.95, found, "a scorer that always says so looks good", WARN)


DATA = {
    "targets": amount,
    "rows without a target": partial(
        share_of, "without_target", "have no target and are left out", "raise --max_length"
    ),
    "rows cut off": partial(
        share_of, "cut", "are cut off at max_length", "raise --max_length, or split them"
    ),
    "duplicates": partial(
        share_of,
        "repeated",
        "are there before, word for word",
        "take them out, or give them a weight",
    ),
    "train and eval apart": overlap,
    "doubled BOS": beginnings,
    "trained end token": ends,
    "special tokens in texts": special_tokens,
    "target mask": mask,
    "labels": labels,
}
