"""Rows of CSV and TSV files."""

from collections.abc import Iterable
import csv
from itertools import chain
from pathlib import Path
from typing import TextIO

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
        table = csv.reader(lines)
    names = None
    for values in table:
        if not values:  # a blank line
            continue
        where = f"{path}:{table.line_num}"
        if names is None:
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
        yield where, dict(zip(names, map(Cell, values)))
