"""One value of the configuration: from the text of a flag to its type, and within its limits."""

import difflib
import math
import operator
import types
import typing

from lora.common.errors import UserError


def nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


BOUNDS = (("low", ">=", operator.ge), ("above", ">", operator.gt), ("high", "<=", operator.le))


def kind_of(annotation):
    """(list, dict or another, the type of the value or of those in it) of a key's type:
    `list[str]`, `int | None`.
    """
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    return typing.get_origin(annotation), parts[-1] if parts else annotation


def check_value(where, value, annotation, limits):
    """`value` as the type the key has, or a UserError that says what was expected."""
    container, kind = kind_of(annotation)
    if container is list:
        return [
            check_value(where, item, kind, limits)
            for item in (value if isinstance(value, list) else [value])
        ]
    if container is dict:
        if not isinstance(value, dict):
            raise UserError(
                f"{where} = {value!r}: expected a table, which only a config file can hold."
            )
        names, limits = limits["choices"], {**limits, "choices": None}
        for name in value:
            if names and name not in names:
                raise UserError(
                    f"{where}.{name}: no such key; expected some of {', '.join(names)}.{nearest(name, names)}"
                )
        return {
            name: check_value(f"{where}.{name}", item, kind, limits) for name, item in value.items()
        }
    if limits["word"] and value == limits["word"]:
        return value
    expected = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        word = f" or {limits['word']}" if limits["word"] else ""
        raise UserError(f"{where} = {value!r}: expected {expected}{word}.")
    if limits["choices"] and value not in limits["choices"]:
        hint = nearest(value, limits["choices"])
        raise UserError(
            f"{where} = {value!r}: expected one of {', '.join(limits['choices'])}.{hint}"
        )
    for name, sign, holds in BOUNDS:
        if limits[name] is not None and not holds(value, limits[name]):
            raise UserError(f"{where} = {value}: expected {expected} {sign} {limits[name]}.")
    return value


def parse_text(text, kind):
    """A flag's text as what it says, or as it is: `check_value` then tells what is wrong with it."""
    truths = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return truths.get(text.lower(), text) if kind is bool else kind(text)
    except ValueError:
        return text
