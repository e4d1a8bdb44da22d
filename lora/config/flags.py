"""Command-line flags made from the keys of the configuration."""

import argparse
from collections.abc import Collection
import dataclasses
from functools import partial
import re
import sys
from typing import Any, NoReturn

from lora.common.base_model_files import require_base
from lora.common.errors import UserError
from lora.common.paths import INSTALLED, script_call
from lora.config.parse_values import kind_of, parse_text
from lora.config.schema import Config
from lora.config.set_keys import set_key
from lora.config.table import ALIASES

# A flag for true or false, which means true without a value.
SWITCH: dict[str, Any] = {"metavar": "{true,false}", "nargs": "?", "const": True}
SWITCH["type"] = partial(parse_text, kind=bool)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` read as `_` in flags, and no abbreviated flags."""

    def __init__(self, description: str) -> None:
        # An installed script is called as `plainlora SCRIPT`.
        name = " ".join(script_call(sys.argv[0])) if INSTALLED else None
        if " " in sys.argv[0]:  # a tool: "plainlora compare"
            name = sys.argv[0]
        super().__init__(name, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")

    def parse_known_args(self, args=None, namespace=None):
        for argument in args:
            if re.search("[\ud800-\udfff]", argument):  # bytes of a name that are not UTF-8
                raise UserError(f"{argument!r}: not UTF-8; rename the file, or write it in UTF-8.")
        return super().parse_known_args([with_underscores(a) for a in args], namespace)


def with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def add_flags(parser: Any, table: Any, names: Collection[str], default: str = "") -> None:
    """Add the flags of those keys of a table that are in `names`, and of their aliases.

    --help gives the table's values as the defaults, or the words `default` for all of them.
    """
    for field in dataclasses.fields(table):
        container, kind = kind_of(field.type)
        if field.name not in names or (container is dict and not field.metadata["metavar"]):
            continue  # most tables are given in the file only
        options = {"metavar": metavar_of(field), "type": partial(parse_text, kind=kind)}
        if kind is bool:
            options = SWITCH
            if field.metadata["word"]:
                options = SWITCH | {"metavar": f"{{true,false,{field.metadata['word']}}}"}
        elif container in (list, dict):
            options |= {"nargs": "+", "action": "extend"}
        help = help_line(field, getattr(table, field.name), default)
        parser.add_argument(f"--{field.name}", help=help, **options)
        for alias in aliases_of(field.name):  # the help of its key names it
            hidden = argparse.SUPPRESS
            if alias == "model_name":  # perhaps meant as the name of the run
                options = {**options, "type": require_base}
            parser.add_argument(f"--{alias}", dest=field.name, help=hidden, **options)


def metavar_of(field: dataclasses.Field) -> str:
    """Return what --help calls a key's value: mostly N, or the last word of the key's name."""
    container, kind = kind_of(field.type)
    limits = field.metadata
    if limits["metavar"]:
        return limits["metavar"]
    if limits["choices"]:
        return f"{{{','.join(limits['choices'])}}}"
    if kind is int:
        return f"N|{limits['word']}" if limits["word"] else "N"
    last_word = field.name.rpartition("_")[2].upper()
    return last_word.removesuffix("S") if container is list else last_word


def aliases_of(name: str) -> list[str]:
    return [alias for alias, key in ALIASES.items() if key == name]


def help_line(field: dataclasses.Field, value: Any, default: str) -> str:
    notes = []
    if not default and value is not False and value not in (None, "", [], {}):
        default = " ".join(value) if isinstance(value, list) else str(value)
    if default:
        notes.append("default: " + default.replace("\n", "\\n"))
    notes += [f"also --{alias}" for alias in aliases_of(field.name)]
    text = field.metadata["help"]
    if notes:
        text += f" ({'; '.join(notes)})"
    return text.replace("%", "%%")  # argparse formats it


def apply_flags(config: Config, arguments: argparse.Namespace, names: Collection[str]) -> None:
    """Set those of some keys whose flags were given."""
    for name in names:
        value = getattr(arguments, name, None)
        if value is not None:
            set_key(config, name, value, f"--{name}")
