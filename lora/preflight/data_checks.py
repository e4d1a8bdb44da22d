"""The checks of the data: targets, rows cut off, duplicates, overlap, masks, labels."""

import json
import math
import re

import numpy as np

from lora.data.batches import is_target
from lora.data.examples import Example
from lora.data.tokenise import NO_TOKEN, Row
from lora.evaluation.stop_tokens import stop_tokens
from lora.model.tokenizer_file import follows_its_file, tokenizer_file
from lora.preflight.check_result import BUG, FAIL, PASS, WARN, Result, require, require_no_faults
from lora.preflight.trial import Trial

MIN_QUOTE = 12  # characters; a shorter message may be in an answer by chance


def share_of_targets(trial: Trial) -> Result:
    facts = trial.facts["train"]
    share = facts["targets"] / facts["tokens"]
    too_few = share < 0.01 and trial.config.model.task == "lm"
    counts = f"{facts['rows']} sequences, {facts['targets']} targets"
    measured = f"{counts}, {share:.1%} of the tokens"
    return require(not too_few, measured, "is so little of the data meant to be learned?", WARN)


def without_target(trial: Trial) -> Result:
    facts = trial.facts["train"]
    count, total = facts["without_target"], facts["examples"]
    measured = f"{count} of {total} examples have no target and are left out"
    return require_no_faults(count, total, measured, "raise --max_length")


def cut_off(trial: Trial) -> Result:
    facts = trial.facts["train"]
    count, total = facts["cut"], facts["examples"]
    measured = f"{count} of {total} examples are cut off at max_length"
    return require_no_faults(count, total, measured, "raise --max_length, or split them")


def duplicates(trial: Trial) -> Result:
    count, total = trial.facts["repeated"], trial.facts["train"]["examples"]
    measured = f"{count} of {total} examples repeat an earlier one word for word"
    return require_no_faults(count, total, measured, "remove them, or give them a weight")


def overlap(trial: Trial) -> Result:
    count, total = trial.facts["overlap"], trial.facts["held_out_subjects"]
    measured = f"{count} of {total} held-out prompts or texts are in the training data"
    advice = "the validation loss will look too good: split by prompt, or leave --eval_data out"
    return require(count == 0, measured, advice, FAIL if 100 * count > total else WARN)


def tokens_of_the_file(trial: Trial) -> Result | None:
    tokenizer = trial.task.tokenizer
    if tokenizer_file(tokenizer) is None:
        return None
    follows = follows_its_file(tokenizer)
    words = "has" if follows else "does not have"
    measured = f"a text of digits, blanks, accents and code {words} the tokens of tokenizer.json"
    return require(follows, measured, BUG)


def doubled_bos(trial: Trial) -> Result:
    bos, rows = trial.task.tokenizer.bos_token_id, trial.rows
    if bos is None:
        return Result(PASS, "this tokenizer has no BOS token")
    has_two_tokens = rows.seq_lens(np.arange(len(rows))) > 1
    first = rows.offsets[:-1][has_two_tokens]
    count = int(((rows.tokens[first] == bos) & (rows.tokens[first + 1] == bos)).sum())
    measured = f"{count} of {len(rows)} sequences begin with two BOS tokens"
    return require(count == 0, measured, "remove one from the texts, or from the chat template")


def end_tokens(trial: Trial) -> Result | None:
    """The last targets of an answer or a text include an end token, so the model learns to stop."""
    if trial.config.model.task == "score":
        return None
    stops = set(stop_tokens(trial.task.model, trial.task.tokenizer))
    total, without_end = 0, 0
    for _, tokenised in trial.tokenised_examples:
        if tokenised.rows and not tokenised.cut:
            total += 1
            last_two = targets_of(tokenised.rows[-1:])[-2:]  # a line end may follow the end token
            without_end += stops.isdisjoint(last_two)
    measured = f"{total - without_end} of {total} examples end with an end token as a target"
    advice = "the model would not learn to stop; correct the tokenizer's eos_token or chat template"
    return require_no_faults(without_end, total, measured, advice)


def targets_of(rows: list[Row]) -> list[int] | list[float]:
    targets = []
    for row in rows:
        targets += [t for t in row.targets if t != NO_TOKEN and not math.isnan(t)]
    return targets


def special_tokens(trial: Trial) -> Result:
    """Special tokens in a text are read as ordinary text in a chat, as special tokens elsewhere."""
    tokenizer = trial.task.tokenizer
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens.update(tokenizer.all_special_tokens)
    tokens.discard("")
    if not tokens:
        return Result(PASS, "this tokenizer has no special tokens")
    pattern = re.compile("|".join(re.escape(token) for token in sorted(tokens)))
    first, count = None, 0
    for example in trial.split.examples(held_out=False):
        if pattern.search(text_of(example)):
            first = first or example
            count += 1
    total = trial.facts["train"]["examples"]
    measured = f"{count} of {total} examples have special tokens in their text"
    if first is None:
        return Result(PASS, measured)
    reading = "they are read as special tokens"
    if first.messages:
        reading = "in a chat they are read as ordinary text"
    return Result(WARN, f"{measured}, {first.where} first: {reading}")


def text_of(example: Example) -> str:
    """Return all that somebody wrote of an example."""
    parts = [example.text, example.prompt, *example.steps]
    parts += [m["content"] for m in example.messages if isinstance(m.get("content"), str)]
    return " ".join(parts)


def target_mask(trial: Trial) -> Result | None:
    """The targets are next tokens: in a chat all that the assistant says, and nothing else."""
    if trial.config.model.task == "score":
        return None
    wrong, num_chats = 0, 0
    not_learned, learned_from_others = [], []  # where these chats stand
    for example, tokenised in trial.tokenised_examples:
        for row in tokenised.rows:
            next_tokens = zip(row.targets, row.tokens[1:])
            wrong += sum(target not in (NO_TOKEN, token) for target, token in next_tokens)
        num_chats += bool(example.messages)
        if example.messages and tokenised.rows and not tokenised.cut:
            learned = letters(trial.task.tokenizer.decode(targets_of(tokenised.rows)))
            weights = example.message_weights or [1.0] * len(example.messages)
            answers = []
            for message, weight in zip(example.messages, weights):
                if message["role"] == "assistant" and weight > 0:
                    answers.append(message.get("content"))
            if not all(letters(answer) in learned for answer in answers):
                not_learned.append(example.where)
            if learns_from_others(example.messages, learned):
                learned_from_others.append(example.where)
    if wrong:
        return Result(FAIL, f"{wrong} targets are not the token that follows; {BUG}")
    if learned_from_others:
        chats = f"{len(learned_from_others)} chats, {learned_from_others[0]} first,"
        return Result(FAIL, f"{chats} train on what the user or the system wrote; {BUG}")
    if not_learned:
        chats = f"in {len(not_learned)} of {num_chats} chats, {not_learned[0]} first,"
        measured = f"{chats} an answer is not learned word for word"
        advice = "the chat template changes or drops it; see python -m lora render"
        return require_no_faults(len(not_learned), num_chats, measured, advice)
    total = len(trial.tokenised_examples)
    return Result(PASS, f"in {total} examples, what is to be learned is a target, and nothing else")


def learns_from_others(messages: list[dict], learned: str) -> bool:
    """Return whether `learned` contains a message that only the user or the system wrote."""
    # Whole messages, because their tool calls may quote what a user wrote.
    by_assistant = letters([m for m in messages if m["role"] == "assistant"])
    for message in messages:
        text = letters(message.get("content"))
        is_others = message["role"] != "assistant" and text not in by_assistant
        if is_others and len(text) >= MIN_QUOTE and text in learned:
            return True
    return False


def letters(content: object) -> str:
    """Return the content of messages without white space and the characters that JSON escapes."""
    if not content:
        return ""
    return re.sub(r'\\[nt]|[\s"\\]', "", json.dumps(content, ensure_ascii=False))


def labels(trial: Trial) -> Result | None:
    """The targets are the labels, in their order, and the labels differ."""
    if trial.config.model.task == "lm":
        return None
    for example, tokenised in trial.tokenised_examples:
        expected = [label for label in example.labels if label is not None]
        found = targets_of(tokenised.rows)
        incomplete = len(found) < len(expected) and not tokenised.cut
        if incomplete or found != expected[: len(found)]:
            lists = f"targets {found[:5]}, labels {expected[:5]}"
            return Result(FAIL, f"{example.where}: {lists}; {BUG}")
    targets = trial.rows.targets[is_target(trial.rows.targets)]
    values, counts = np.unique(targets, return_counts=True)
    share = counts.max() / counts.sum()
    commonest = f"the most frequent label, {values[counts.argmax()]:g}, is {share:.1%} of them"
    measured = f"mean {targets.mean():.3f}; {commonest}"
    if len(values) == 1:
        return Result(FAIL, f"{measured}; add steps with other labels, or nothing can be learned")
    advice = "a scorer that always predicts it has a low loss"
    return require(share <= 0.95, measured, advice, WARN)


DATA = {
    "targets": share_of_targets,
    "examples without a target": without_target,
    "examples cut off": cut_off,
    "duplicates": duplicates,
    "overlap with held-out data": overlap,
    "tokenizer": tokens_of_the_file,
    "doubled BOS token": doubled_bos,
    "end token learned": end_tokens,
    "special tokens in texts": special_tokens,
    "target mask": target_mask,
    "labels": labels,
}
