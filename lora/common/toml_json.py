"""TOML and JSON: reading the tables of a file, writing tables as TOML."""

import json
import math
import os
from pathlib import Path
import tomllib
from typing import Any

from lora.common.errors import UserError


def to_toml(tables: dict[str, dict[str, Any]]) -> str:
    """Return tables of strings, numbers, booleans, lists and inline tables as TOML."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
        lines.append("")
    return "\n".join(lines)


def to_json(value: Any) -> str:
    """Return a value as the indented JSON of a file that is written."""
    return json.dumps(value, indent=2, default=json_value) + "\n"


def toml_value(value: Any) -> str:
    """Return a value as TOML, which reads JSON's values except tables and the DEL character."""
    if isinstance(value, dict):
        pairs = [f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(value, ensure_ascii=False, default=json_value).replace("\x7f", "\\u007f")


def json_value(value: Any) -> Any:
    """Return what stands in a file for a value that JSON has no word for.

    Numbers and arrays of numpy are numbers and lists, sets are lists. Anything else is its text,
    which a key of another type refuses when it is read.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_file(path: str | Path) -> dict[str, Any]:
    """Return the tables of a TOML, JSON or YAML file. Raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if str(path).endswith((".yaml", ".yml")):
            from lora.common.yaml_file import parse_yaml

            tables = parse_yaml(text)
        elif str(path).endswith(".json"):
            tables = parse_json(text)
        else:
            tables = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(tables, dict):
        raise UserError(f"{path}: expected a table of keys, found a {type(tables).__name__}.")
    return tables


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError, also where a key is given twice."""
    return json.loads(text, object_pairs_hook=dict_of_different_keys)


def dict_of_different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return result


def without_nan(values: Any) -> Any:
    """Return numbers, or lists and tables of them, with None for NaN and infinity."""
    if isinstance(values, dict):
        return {name: without_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [without_nan(value) for value in values]
    return values if math.isfinite(values) else None
