"""Command-line flags made from the keys of the configuration."""

import argparse
import dataclasses
from functools import partial

from lora.common.errors import UserError
from lora.config.tables import ALIASES, set_key
from lora.config.values import kind_of, parse_text

SWITCH = {"nargs": "?", "const": True, "metavar": "BOOL", "type": partial(parse_text, kind=bool)}


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, `-` read as `_` in flags, and no guessing of abbreviated ones."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}. See --help.")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([underscored(a) for a in args], namespace)


def underscored(argument):
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def add_flags(parser, table, names, default=""):
    """Flags for some keys of a table, and for their aliases. default: what their help says of it,
    where it is no value.
    """
    for f in dataclasses.fields(table):
        value, choices, (container, kind) = (
            getattr(table, f.name),
            f.metadata["choices"],
            kind_of(f.type),
        )
        if f.name not in names or container is dict:
            continue  # a dict is given as a table in the file
        notes = [", ".join(choices)] if choices else []
        if default or value not in (None, "", []):
            said = default or (" ".join(value) if isinstance(value, list) else str(value))
            notes.append("default: " + said.replace("\n", "\\n"))
        help = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
        flags = [
            f"--{f.name}",
            *(f"--{alias}" for alias, real in ALIASES.items() if real == f.name),
        ]
        form = (
            {"nargs": "+", "action": "extend"}
            if container is list
            else SWITCH
            if kind is bool
            else {}
        )
        form = {"metavar": "X", "type": partial(parse_text, kind=kind)} | form
        parser.add_argument(*flags, dest=f.name, help=help.replace("%", "%%"), **form)


def apply_flags(config, arguments, names):
    """Set those of some keys whose flags were given."""
    for name in names:
        if getattr(arguments, name, None) is not None:
            set_key(config, name, getattr(arguments, name), f"--{name}")
