"""Rows of JSONL, JSON (a list), CSV, TSV and text files, also as .gz, each with its file:line."""

from collections.abc import Iterator
import csv
import gzip
from io import BufferedIOBase
import json
from pathlib import Path
import re
from typing import Any, TextIO
import zlib

from lora.common.errors import UserError
from lora.common.toml_json import parse_json
from lora.data.examples import SourceRows

HUB = "hf://datasets/"
LISTED = 10  # problems of a file that an error names
PLACES = 3  # rows that it names for each of them
NUMERIC_COLUMNS = ("score", "label", "weight")  # of a table
PAIR_COLUMNS = ["sentence1", "sentence2", "score"]  # of a table without a header
# float() would also read 1_6, Arabic digits and "nan"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
Values = Iterator[tuple[str, Any]]  # file:line, and what should be a row


def read_rows(path: str, bad_rows: list[UserError] | None = None) -> SourceRows:
    """Yield the rows of a file with their file:line.

    Args:
        path: a local file, or one of the Hub: hf://datasets/OWNER/NAME[@REVISION]/PATH.
        bad_rows: takes what cannot be read, for `raise_bad_rows`; without it, that is called here.
    """
    readers: dict = {"jsonl": jsonl_rows, "json": json_rows, "csv": csv_rows, "tsv": csv_rows}
    readers.update({"txt": text_rows, "text": text_rows, "md": text_rows})
    name = path.lower().removesuffix(".gz")
    suffix = name.rpartition(".")[2]
    if suffix not in readers:
        expected = f"a file named .{', .'.join(readers)} (or one of these with .gz)"
        raise UserError(f"{path}: expected {expected}.")
    collected = [] if bad_rows is None else bad_rows
    opener = gzip.open if name != path.lower() else open
    try:
        with opener(local_path(path), "rt", encoding="utf-8-sig", newline="") as file:
            for where, row in readers[suffix](path, file, collected):
                if isinstance(row, dict):
                    yield where, row
                else:
                    problem = f"expected a JSON object, found {type(row).__name__}"
                    collected.append(UserError(f"{where}: {problem}."))
    except UserError as error:
        collected.append(error)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        collected.append(UserError(f"{path}: {reason}."))
    except UnicodeDecodeError as error:
        line, byte = first_undecodable(opener(local_path(path), "rb"), error)
        advice = "convert it: iconv -f ITS_ENCODING -t utf-8"
        collected.append(UserError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; {advice}."))
    if bad_rows is None:
        raise_bad_rows(path, collected)


def first_undecodable(file: BufferedIOBase, error: UnicodeDecodeError) -> tuple[int | str, int]:
    """Return the first line that is not UTF-8, and its first byte that is not."""
    with file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error_in_line:
                return number, line[error_in_line.start]
    return "", error.object[error.start]


def raise_bad_rows(path: str, bad_rows: list[UserError]) -> None:
    """Raise one UserError for all bad rows, if there are any.

    It says each of the first ten problems once, with its first three rows and their number.
    """
    rows_of_problem: dict[str, list[str]] = {}
    for error in bad_rows:
        text = str(error).removeprefix(f"{path}:").strip(" .")
        row, problem = re.fullmatch(r"((?:row )?[\d:]+: )?(.*)", text, re.DOTALL).groups("")
        rows_of_problem.setdefault(problem, []).append(row.removesuffix(": "))
    listed = []
    for problem, rows in list(rows_of_problem.items())[:LISTED]:
        more = f" and {len(rows) - PLACES} more" if len(rows) > PLACES else ""
        listed.append(f"{', '.join(rows[:PLACES])}{more}: {problem}".removeprefix(": "))
    if len(bad_rows) == 1:
        raise bad_rows[0]
    if bad_rows:
        end = "; ..." if len(rows_of_problem) > LISTED else "."
        raise UserError(f"{path}: {len(bad_rows)} bad rows: {'; '.join(listed)}{end}")


def local_path(path: str) -> Path:
    """Return where a file lies; a file of the Hub is downloaded once. Raises UserError."""
    if not path.startswith(HUB):
        if Path(path).is_dir():
            raise UserError(f"{path}: a folder; name its files.")
        if not Path(path).is_file():
            raise UserError(f"{path}: No such file or directory.")
        return Path(path)
    match = re.fullmatch(HUB + r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
    if not match:
        raise UserError(f"{path}: expected {HUB}OWNER/NAME/PATH (or OWNER/NAME@REVISION/PATH).")
    # Imported here because it takes half a second, which only a file of the Hub is worth.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision, name = match.groups()
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
        raise UserError(f"{path}: {str(error).strip().splitlines()[0]}") from None


def parse_json_row(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        if "\n" in text.strip():
            where = f"{where}:{error.lineno}"
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}).") from None


def jsonl_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> Values:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json_row(where, line)
        except UserError as error:
            bad_rows.append(error)
        else:
            yield where, value


def json_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> Values:
    values = parse_json_row(path, file.read())
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {type(values).__name__}.")
    for number, value in enumerate(values, 1):
        yield f"{path}: row {number}", value


def csv_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> SourceRows:
    """Yield rows under the names in the first line, or pairs if it is two texts and a number."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a document; csv's own limit is 128 KiB
    is_tsv = path.lower().removesuffix(".gz").endswith("tsv")
    if is_tsv:  # a quote is a character like any other there
        table = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.reader(file)
    names = None
    for values in table:
        if not values:  # a blank line
            continue
        where = f"{path}:{table.line_num}"
        if names is None:
            has_header = len(values) != 3 or not is_number(values[2])
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
        row: dict[str, Any] = dict(zip(names, values))
        for name in NUMERIC_COLUMNS:
            if name in row and is_number(row[name]):
                row[name] = float(row[name])
        yield where, row


def text_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> SourceRows:
    """Yield a text file as one document, with line ends read as "\\n"."""
    text = file.read().replace("\r\n", "\n")
    if text.strip():
        yield path, {"text": text}


def is_number(text: str) -> bool:
    return NUMBER.fullmatch(text.strip()) is not None
