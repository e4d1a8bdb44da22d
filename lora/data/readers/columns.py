"""--columns: the values of a row under our keys."""

from typing import Any

ABSENT = object()


def with_columns(row: dict, columns: dict[str, str]) -> dict:
    """Return a row with the value of each of their keys under ours, {ours: theirs}.

    a.b.0 leads into an object or a list. Theirs may be absent: another file may have our keys.
    """
    found = {}
    for ours, theirs in columns.items():
        value: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if isinstance(value, list):
                value = {str(index): item for index, item in enumerate(value)}
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is not ABSENT and not (value is None and ours in row):
            found[ours] = value
    read = {columns[ours] for ours in found}
    return {name: value for name, value in row.items() if name not in read} | found
