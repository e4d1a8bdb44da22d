"""Advice about a row that no reader takes: what would make it readable."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
import re
from typing import Any

from lora.data.examples import from_cell

# Words in the keys of other data sets that mean ours, the likeliest first
PROMPTS = ("prompt", "question", "query", "instruction", "input", "user", "human", "problem", "q")
ANSWERS = (
    "completion", "answer", "answers", "response", "output", "reply", "assistant", "solution",
    "target", "summary", "translation", "a",
)  # fmt: skip
PREFERENCES = (
    "chosen and rejected: a preference row (DPO); here a model learns from good answers alone, "
    "not from comparisons; --columns {} learns the chosen ones."
)
TO_MESSAGES = (
    "if {key} holds the turns of a chat: python -c 'import json; "
    '[print(json.dumps({{"messages": [{{"role": ["user", "assistant"][i % 2], "content": t}} '
    """for i, t in enumerate(json.loads(r)["{key}"])]}})) for r in open("FILE")]' > chats.jsonl"""
)
UNLABELLED = 'to score chains without labels, add "labels": [null, ...], a null for each step'


def why_not_read(row: dict, forms: Sequence[set[str]], task: str) -> str:
    """Return what was found in a row, the nearest forms, and how to read it, if that is known."""
    if "chosen" in row and "rejected" in row:
        return PREFERENCES.format(columns_of_chosen(row))
    kinds = {}
    for key, value in row.items():
        kinds[str(key)] = kind(value)
        if isinstance(value, dict):
            kinds.update({f"{key}.{inner}": kind(item) for inner, item in value.items()})
    return advice(tuple(kinds.items()), tuple(map(frozenset, forms)), task)


def columns_of_chosen(row: dict) -> str:
    """Return the --columns that learn the chosen answer of a preference row, alone or in a chat."""
    is_chat = isinstance(row["chosen"], list)
    others = [key for key in row if kind(row[key]) in ("text", "list of messages")]
    prompt = meaning([key for key in others if key not in ("chosen", "rejected")], PROMPTS)
    # Beside a prompt, TRL's rows have the answer alone.
    if is_chat and not (prompt and len(row["chosen"]) == 1):
        return "messages=chosen"
    if not prompt:  # as hh-rlhf's, with the question in the same text
        return "text=chosen (all of its text, and a question in it too)"
    if prompt == "prompt":
        return "completion=chosen"
    return f"prompt={prompt} completion=chosen"


@lru_cache(maxsize=1000)  # all rows of a file may have the same keys
def advice(kinds: tuple, forms: tuple, task: str) -> str:
    keys = {name: found for name, found in kinds if "." not in name}
    columns = score_columns(dict(kinds)) if task == "score" else chat_columns(dict(kinds))
    own = " ".join(sorted(keys))

    def nearness(form: frozenset) -> tuple[bool, float]:
        return form == columns.keys(), SequenceMatcher(None, " ".join(sorted(form)), own).ratio()

    shapes = [", ".join(sorted(form)) for form in sorted(forms, key=nearness, reverse=True)[:3]]
    turns = [key for key in keys if keys[key] == "list of texts"]
    mend = "name the keys that have these meanings: --columns OURS=THEIRS"
    if columns:
        pairs = [f"{ours}={theirs}" for ours, theirs in columns.items() if ours != theirs]
        mend = f"add --columns {' '.join(pairs)}"
    elif task == "score" and {"prompt", "steps"} <= keys.keys():
        mend += f"; {UNLABELLED}"
    elif turns and task == "lm":
        mend = TO_MESSAGES.format(key=turns[0])
    listed = ", ".join(f"{key} ({found})" for key, found in keys.items())
    return f"keys found: {listed or 'none'}; expected one of: {'; '.join(shapes)}; {mend}."


def kind(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, list):
        kinds = {kind(item) for item in value if item is not None}
        return f"list of {kinds.pop()}s" if len(kinds) == 1 else "list"
    if isinstance(value, dict):
        return "message" if {"role", "from"} & value.keys() else "object"
    value = from_cell(value)
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, (int, float)) else "no value"


def meaning(keys: list[str], words: Sequence[str]) -> str:
    """Return the key with the first of these words, or ""."""
    for word in words:
        for key in keys:
            if word in re.split(r"[^a-z]+", key.lower()):
                return key
    return ""


def chat_columns(kinds: dict[str, str]) -> dict[str, str]:
    """Return {our key: theirs} of a chat, of a prompt and its answer, or of a text; or {}."""
    for key in kinds:
        if kinds[key] == "list of messages":
            return {"messages": key}
    texts = [key for key in kinds if kinds[key] == "text" and key != "rejected"]
    lists = [f"{key}.0" for key in kinds if kinds[key] == "list of texts"]
    answer = meaning(texts, ANSWERS) or meaning(lists, ANSWERS)
    prompt = meaning([text for text in texts if text != answer], PROMPTS)
    # Two texts: if one is known to be the prompt or the answer, the other text is the other one.
    if len(texts) == 2 and answer in ("", *texts):
        prompt = prompt or next(text for text in texts if text != answer)
        answer = next(text for text in texts if text != prompt)
    if prompt and answer:
        return {"prompt": prompt, "completion": answer}
    return {"text": texts[0]} if len(texts) == 1 and not lists else {}


def score_columns(kinds: dict[str, str]) -> dict[str, str]:
    """Return {our key: theirs} of a chain with labels, or of a pair with a score; or {}."""
    keys_by_kind: dict[str, list[str]] = {}
    for key in kinds:
        keys_by_kind.setdefault(kinds[key], []).append(key)
    texts, numbers = keys_by_kind.get("text", []), keys_by_kind.get("number", [])
    steps, labels = keys_by_kind.get("list of texts"), keys_by_kind.get("list of numbers")
    if texts and steps and labels:
        prompt = meaning(texts, PROMPTS) or texts[0]
        return {"prompt": prompt, "steps": steps[0], "labels": labels[0]}
    if len(texts) == 2 and len(numbers) == 1:
        return {"sentence1": texts[0], "sentence2": texts[1], "score": numbers[0]}
    return {}
