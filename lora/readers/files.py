"""Rows of JSONL, JSON (a list) and CSV or TSV files, each with its file:line."""

import csv
import json

from lora.errors import UserError


csv.field_size_limit(2**31 - 1)  # a cell may hold a document; csv's own limit is 128 KiB


def rows(path):
    """Yield (file:line, row as a dict). Raises UserError for what cannot be read."""
    readers = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "tsv": csv_rows}
    suffix = path.rpartition(".")[2].lower()
    if suffix not in readers:
        raise UserError(f"{path}: expected a file named .{', .'.join(readers)}.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from readers[suffix](path, file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except csv.Error as error:
        raise UserError(f"{path}: {error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; convert it: iconv -t utf-8."
        ) from None


def parse(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}).") from None


def as_row(where, value):
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return where, value


def jsonl_rows(path, file):
    for number, line in enumerate(file, 1):
        if line.strip():
            yield as_row(f"{path}:{number}", parse(f"{path}:{number}", line))


def json_rows(path, file):
    values = parse(path, file.read())
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {type(values).__name__}.")
    for number, value in enumerate(values, 1):
        yield as_row(f"{path}: row {number}", value)


def csv_rows(path, file):
    """Rows under the names in the first line; three columns that end in a number are a pair without a header."""
    table = csv.reader(file, delimiter="\t" if path.lower().endswith("tsv") else ",")
    names = None
    for values in filter(None, table):  # a blank line is no row
        where = f"{path}:{table.line_num}"
        if names is None:
            names = ["sentence1", "sentence2", "score"] if len(values) == 3 and is_number(values[2]) else values
            if names is values:
                continue
        if len(values) != len(names):
            raise UserError(f"{where}: {len(values)} columns, expected {len(names)} ({', '.join(names)}).")
        yield where, {n: float(v) if n in ("score", "label") and is_number(v) else v for n, v in zip(names, values)}


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
