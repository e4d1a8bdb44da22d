"""Rows of a JSON document over several lines: a list, an object that holds lists, or objects."""

from collections.abc import Iterator
from itertools import chain
import json
import re
from typing import Any

from lora.common.errors import UserError
from lora.common.toml_json import dict_of_different_keys
from lora.data.file_kinds import SPLIT_NAMES

NOT_BLANK = re.compile(r"\S")
# A key as "test", "training", "train_set" or "my-dev"
SPLIT_KEY = re.compile(rf"(?:.*[_.-])?({SPLIT_NAMES})(?:ing)?(?:[ _.-].*)?")


def document_rows(path: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield where a row stands, and the row. Raises UserError."""
    decoder = json.JSONDecoder(object_pairs_hook=dict_of_different_keys)
    values: list[Any] = []
    start = NOT_BLANK.search(text)
    try:
        while start:
            value, end = decoder.raw_decode(text, start.start())
            values.append(value)
            start = NOT_BLANK.search(text, end)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read ({error}).") from None

    rows = rows_in(path, values[0]) if len(values) == 1 else values
    if len(rows) == 1 and rows[0] is values[0]:  # the document itself is the row
        yield f"{path}:1", rows[0]
        return
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def rows_in(path: str, value: Any) -> list:
    """Return the rows of [row, ...], {"data": [row, ...]} or {NAME: [row, ...], ...}; or [row]."""
    if isinstance(value, dict) and is_table(value.get("data")):
        others = [part for name, part in value.items() if name != "data"]
        if not any(part and is_table(part) for part in others):
            return value["data"]
    if isinstance(value, dict) and value and all(is_table(part) for part in value.values()):
        matches = [SPLIT_KEY.fullmatch(name.lower()) for name in value]
        splits = {match[1] for match in matches if match}
        if len(splits) > 1:
            found = f"the splits {', '.join(sorted(splits))} in one object"
            raise UserError(f"{path}: {found}; write each to a file of its own.")
        return list(chain.from_iterable(value.values()))
    return value if isinstance(value, list) else [value]


def is_table(value: Any) -> bool:
    """Return whether this is a list of objects which are not the messages of a chat."""
    is_list = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return is_list and bool(value) and not {"role", "from"} & value[0].keys()
