"""One value of the configuration: what it may be, and how it is read from text and checked."""

from collections.abc import Mapping
import dataclasses
import difflib
import math
import re
import types
import typing
from typing import Any

from lora.common.errors import UserError

KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def key(
    default, help: str, *, low=None, above=None, high=None, choices=None, word=None, metavar=None
) -> Any:
    """Return the dataclass field of a configuration key.

    Args:
        low, above, high: bounds; a value may equal low and high, but not above.
        choices: the values it may have.
        word: a text that may take the place of a number, of true and false, or of a list ("none").
        metavar: what --help calls its value, if `flags.metavar_of` cannot tell from the rest.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "word": word}
    metadata = {"help": help, "metavar": metavar, **limits}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


NO_LIMITS: Mapping[str, Any] = key(None, "").metadata


def nearest(name: str, meanings: Mapping[str, str]) -> str:
    """Return a question that names what the most similar of the known names means, or ""."""
    matches = difflib.get_close_matches(name, meanings, n=1, cutoff=0.8)  # a slip of the keys
    return f" Did you mean {meanings[matches[0]]}?" if matches else ""


def kind_of(annotation: Any) -> tuple[Any, type]:
    """Split list[str], dict[str, int] or int | None into its container and its values' type."""
    arguments = typing.get_args(annotation)
    kinds = [argument for argument in arguments if argument is not types.NoneType]
    return typing.get_origin(annotation), kinds[-1] if kinds else annotation


def check_value(where: str, value: Any, annotation: Any, limits: Mapping[str, Any]) -> Any:
    """Return `value` as the type that its key has. Raises UserError with what was expected.

    `where` begins the messages ("--lora_r", "run.toml: lora.lora_r"); `limits` are from `key`.
    """
    container, kind = kind_of(annotation)
    if container is list:
        items = value if isinstance(value, list) else [value]
        if limits["word"] == "none":
            items = split_names(items)
        return [check_item(where, item, kind, limits) for item in items]
    if container is not dict:
        return check_item(where, value, kind, limits)
    if limits["metavar"] and not isinstance(value, dict):
        value = parse_pairs(where, value if isinstance(value, list) else [value])
    if not isinstance(value, dict):
        expected = "expected a table, which only a config file can hold"
        raise UserError(f"{where} = {value!r}: {expected}.")
    table = {}
    for name, item in value.items():
        table[name] = check_item(f"{where}.{name}", item, kind, limits)
    return table


def parse_pairs(where: str, pairs: list[Any]) -> dict[str, str]:
    """Return the table that texts OURS=THEIRS stand for. Raises UserError."""
    table: dict[str, str] = {}
    for pair in pairs:
        ours, equals, theirs = str(pair).partition("=")
        if not ours or not theirs or ours in table:
            problem = "is given twice" if ours in table else "expected OURS=THEIRS"
            raise UserError(f"{where} {pair}: {problem}.")
        table[ours] = theirs
    return table


def split_names(items: list[Any]) -> list[Any]:
    """Split "a,b" and drop "none". An item with other signs is a regular expression: not split."""
    names = []
    for item in items:
        is_plain = isinstance(item, str) and re.fullmatch(r"[\w., -]*", item)
        names += item.replace(" ", "").split(",") if is_plain else [item]
    return [name for name in names if name not in ("", "none")]


def check_item(where: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """Return a single value of a kind and within the limits. Raises UserError."""
    word, choices = limits["word"], limits["choices"]
    if word and value == word:
        return value
    expected = KINDS[kind]
    if isinstance(value, str):
        value = parse_text(value, kind)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        if word:
            expected = f"true, false or {word}" if kind is bool else f"{expected} or {word}"
        raise UserError(f"{where} = {value!r}: expected {expected}.")
    if kind is str and "\0" in value:
        raise UserError(f"{where} = {value!r}: a NUL character; take it out.")
    if choices and value not in choices:
        from lora.config.other_words import VALUES

        if VALUES.get(value) in choices:
            return VALUES[value]
        hint = nearest(value, {choice: choice for choice in choices})
        raise UserError(f"{where} = {value!r}: expected one of {', '.join(choices)}.{hint}")
    bound = broken_bound(value, limits)
    if bound:
        raise UserError(f"{where} = {value}: expected {expected} {bound}.")
    return value


def broken_bound(value: Any, limits: Mapping[str, Any]) -> str:
    """Return the bound that a value breaks, such as ">= 1", or ""."""
    low, above, high = limits["low"], limits["above"], limits["high"]
    if low is not None and value < low:
        return f">= {low}"
    if above is not None and value <= above:
        return f"> {above}"
    if high is not None and value > high:
        return f"<= {high}"
    return ""


def parse_text(text: str, kind: type) -> Any:
    """Return the value that a flag's text stands for; `check_value` refuses text that is none."""
    if kind is bool:
        return TRUTHS.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text
