"""TOML and JSON: reading the tables of a file, writing tables as TOML."""

import json
import math
from pathlib import Path

import tomli

from lora.common.errors import UserError


def to_toml(tables):
    """TOML for tables of strings, numbers, booleans, lists and tables; JSON writes all but the last
    as TOML reads them.
    """
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{k} = {toml_value(v)}" for k, v in table.items()), ""]
    return "\n".join(lines)


def toml_value(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_file(path):
    """The tables of a TOML file, or of a JSON file with the same keys. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        tables = json.loads(text) if str(path).endswith(".json") else tomli.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(tables, dict):
        raise UserError(f"{path}: expected a table of keys, found a {type(tables).__name__}.")
    return tables


def without_nan(values):
    """`values` (numbers, pairs of them, and tables) with None for what is not finite: JSON has no
    NaN.
    """
    if isinstance(values, dict):
        return {name: without_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_nan(value) for value in values]
    return values if math.isfinite(values) else None
