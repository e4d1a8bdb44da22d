"""--columns: the values of a row under our keys."""

from typing import Any

ABSENT = object()


def with_columns(row: dict, columns: dict[str, str]) -> tuple[dict, dict[str, str]]:
    """Return a row with the value of each of their keys under ours, {ours: theirs}.

    a.b.0 leads into an object or a list. Theirs may be absent: another file may have our keys. The
    second value is {ours: the row's key that holds it} of those that are there.
    """
    found = {}
    sources = {}
    for ours, theirs in columns.items():
        value: Any = row
        parts = [theirs] if theirs in row else theirs.split(".")
        for part in parts:
            if isinstance(value, list):
                value = {str(index): item for index, item in enumerate(value)}
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is not ABSENT and not (value is None and ours in row):
            found[ours] = value
            sources[ours] = parts[0]
    read = {columns[ours] for ours in found}
    return {name: value for name, value in row.items() if name not in read} | found, sources
