"""Command-line flags made from the keys of the configuration."""

import argparse
from collections.abc import Collection
import dataclasses
from functools import partial
import sys
from typing import Any, NoReturn

from lora.common.errors import UserError
from lora.common.paths import INSTALLED, script_call
from lora.config.parse_values import kind_of, parse_text
from lora.config.schema import Config
from lora.config.set_keys import ALIASES, set_key


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` read as `_` in flags, and no abbreviated flags."""

    def __init__(self, description: str) -> None:
        # An installed script is called as `plainlora SCRIPT`.
        name = " ".join(script_call(sys.argv[0])) if INSTALLED else None
        super().__init__(name, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")

    def parse_known_args(self, args=None, namespace=None):
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
        if field.name not in names or container is dict:
            continue  # a dict is given as a table in the file
        flags = [f"--{field.name}"]
        flags += [f"--{alias}" for alias, name in ALIASES.items() if name == field.name]
        help = help_line(field, getattr(table, field.name), default)
        if container is not list and kind is bool:
            add_switch(parser, flags, help)
            continue
        many = {"nargs": "+", "action": "extend"} if container is list else {}
        parse = partial(parse_text, kind=kind)
        parser.add_argument(*flags, help=help, metavar="X", type=parse, **many)


def add_switch(parser: Any, flags: list[str], help: str) -> None:
    """Add a flag for true or false; without a value it means true."""
    parse = partial(parse_text, kind=bool)
    parser.add_argument(*flags, help=help, metavar="BOOL", type=parse, nargs="?", const=True)


def help_line(field: dataclasses.Field, value: Any, default: str) -> str:
    notes = []
    if field.metadata["choices"]:
        notes.append(", ".join(field.metadata["choices"]))
    if not default and value not in (None, "", []):
        default = " ".join(value) if isinstance(value, list) else str(value)
    if default:
        notes.append("default: " + default.replace("\n", "\\n"))
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
