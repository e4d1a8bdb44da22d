"""Rows of CSV and TSV files."""

from collections.abc import Iterable, Iterator
import csv
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from lora.common.errors import UserError
from lora.data.examples import Cell, SourceRows, from_cell

PAIR_COLUMNS = ["sentence1", "sentence2", "score"]  # of a table without a header


def csv_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> SourceRows:
    """Yield rows under the names in the first line, or pairs if it is two texts and a number."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a document; csv's own limit is 128 KiB
    first_line = file.readline()
    lines: Iterable[str] = chain([first_line], file)
    if ".tsv" in Path(path.lower()).suffixes or ("\t" in first_line and "," not in first_line):
        # A quote is a character like any other there.
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        # Strict, or a cell that begins with a lone quote would hold the rows that follow it.
        table = csv.reader(lines, strict=True)
    names = None
    for where, values in with_lines(path, table):
        if not values:  # a blank line
            continue
        if names is None:
            separators = [mark for mark in ";|" if mark in values[0]]
            if len(values) == 1 and separators:
                found = f"columns are separated by {separators[0]!r}"
                raise UserError(f"{where}: {found}; expected commas; save it with these.")
            has_header = len(values) != 3 or not isinstance(from_cell(Cell(values[2])), float)
            names = values if has_header else PAIR_COLUMNS
            for name in names:
                if name and names.count(name) > 1:
                    raise UserError(f"{where}: the column {name!r} is there twice; rename one.")
            if has_header:
                continue
        if len(values) != len(names):
            expected = f"expected {len(names)} ({', '.join(names)})"
            bad_rows.append(UserError(f"{where}: {len(values)} columns, {expected}."))
            continue
        if table.dialect.quoting == csv.QUOTE_NONE and any(map(is_quoted, values)):
            found = 'a cell in quotes, with "" for a quote inside, as in a CSV file'
            raise UserError(f"{where}: {found}; save it as CSV, or take these quotes out.")
        yield where, dict(zip(names, map(Cell, values)))


def with_lines(path: str, table: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of a csv.reader, each with its file:line. Raises UserError."""
    first_line = 1
    try:
        for values in table:
            yield f"{path}:{table.line_num}", values
            first_line = table.line_num + 1
    except csv.Error as error:
        expected = 'a cell that begins with " ends with one, and has "" for each " between them'
        raise UserError(f"{path}:{first_line}: {error}; {expected}.") from None


def is_quoted(cell: str) -> bool:
    """Return whether a cell stands in quotes, with "" for each quote inside, and has one inside."""
    inner = cell[1:-1]
    is_enclosed = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return is_enclosed and '""' in inner and '"' not in inner.replace('""', "")
