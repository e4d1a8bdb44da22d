"""Rows of JSON, CSV, TSV and text files, compressed or not, each with its file:line.

A rare case has a module of its own, imported when it occurs: tables, Parquet and Arrow, the Hub,
folders, and rows that cannot be read.
"""

import bz2
from collections.abc import Iterator
import gzip
from itertools import chain
import json
import lzma
from pathlib import Path
import re
from typing import Any, TextIO
import zlib

from lora.common.errors import UserError
from lora.common.printable_text import print_on_rank_zero
from lora.common.toml_json import parse_json
from lora.data.examples import SourceRows
from lora.data.file_kinds import HUB, kind_of

# A compressed file is known by its first bytes, as its name may be wrong.
COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ\x00": lzma}
# Parquet, Arrow (two kinds), zstd, zip, SQLite, PDF
BINARY = (b"PAR1", b"ARROW1", b"\xff" * 4, b"(\xb5/\xfd", b"PK\3\4", b"SQLite", b"%PDF")
JSON_ROW = re.compile(r"\s*(\[\s*)?\{\s*\"")
MAX_TEXT_LENGTH = 2**21  # characters of a text file that are one document
Values = Iterator[tuple[str, Any]]  # file:line, and what should be a row


def read_rows(path: str, bad_rows: list[UserError] | None = None) -> SourceRows:
    """Yield the rows of a file, or of the files of a folder, with their file:line.

    Args:
        path: a local file, folder or glob, or one of the Hub (hub_files.py).
        bad_rows: collects the errors, for the caller to raise; None: they are raised here.
    """
    collected = [] if bad_rows is None else bad_rows
    try:
        for name, file in local_files(path).items():
            yield from rows_of_file(name, file, collected)
    except UserError as error:
        collected.append(error)
    if bad_rows is None:
        raise_bad_rows(path, collected)


def rows_of_file(name: str, path: Path, bad_rows: list[UserError]) -> SourceRows:
    """Yield the rows of the file at `path`, which messages call `name`."""
    opener: Any = open
    try:
        with open(path, "rb") as raw:
            beginning = raw.read(16)
        if beginning == b"version https://":
            raise UserError(f"{name}: a pointer of Git LFS, not the data; fetch it: git lfs pull.")
        for magic, compression in COMPRESSIONS.items():
            if beginning.startswith(magic):
                opener = compression.open
        if beginning.startswith(BINARY):
            from lora.data.other_files import binary_rows

            yield from binary_rows(name, path, beginning)
            return
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            read = reader_of(name, file)
            for where, row in read(name, file, bad_rows):
                if isinstance(row, dict):
                    yield where, row
                else:
                    problem = f"expected a JSON object, found {type(row).__name__}"
                    bad_rows.append(UserError(f"{where}: {problem}."))
    except UserError as error:
        bad_rows.append(error)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        bad_rows.append(UserError(f"{name}: {reason}."))
    except UnicodeDecodeError as error:
        from lora.data.bad_rows import first_undecodable

        line, byte = first_undecodable(opener(path, "rb"), error)
        advice = "convert it: iconv -f ITS_ENCODING -t utf-8"
        bad_rows.append(UserError(f"{name}:{line}: byte {byte:#04x} is not UTF-8; {advice}."))


def reader_of(name: str, file: TextIO) -> Any:
    """Return the function that yields the rows of a file, by its ending and its first line."""
    kind = kind_of(name)
    if kind != "json":
        first_line = file.readline(2**16)
        file.seek(0)
        if JSON_ROW.match(first_line):
            print_on_rank_zero(f"note: {name}: its content is JSON, so it is read as JSON")
            kind = "json"
    if not kind:
        from lora.data.other_files import how_to_convert

        raise UserError(f"{name}: {how_to_convert(name)}")
    if kind == "table":
        from lora.data.tables import csv_rows

        return csv_rows
    return json_rows if kind == "json" else text_rows


def local_files(path: str) -> dict[str, Path]:
    """Return {name in messages: file} of what a path names, in order. Raises UserError."""
    if path.startswith(HUB):
        from lora.data.hub_files import hub_files

        return hub_files(path)
    if Path(path).is_file():
        return {path: Path(path)}
    from lora.data.file_sets import files_of_set

    return files_of_set(path)


def raise_bad_rows(path: str, bad_rows: list[UserError]) -> None:
    """Raise one UserError for all bad rows, if there are any."""
    if len(bad_rows) == 1:
        raise bad_rows[0]
    if bad_rows:
        from lora.data.bad_rows import summary

        raise UserError(f"{path}: {len(bad_rows):,} bad rows: {summary(path, bad_rows)}")


def json_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> Values:
    """Yield the rows of JSON Lines, or of one JSON document; the first line decides which."""
    lines = []
    filled = []
    for line in file:
        lines.append(line)
        if line.strip():
            filled.append(line.strip())
        if len(filled) == 2:
            break
    first = filled[0] if filled else ""
    if len(filled) == 1 or first.startswith("[") or first.endswith(("{", "[", ",")):
        from lora.data.json_documents import document_rows

        yield from document_rows(path, "".join(lines) + file.read())
        return
    for number, line in enumerate(chain(lines, file), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg}, column {error.colno})"
            bad_rows.append(UserError(f"{where}: {problem}."))
        except (ValueError, RecursionError) as error:
            bad_rows.append(UserError(f"{where}: not JSON that can be read ({error})."))
        else:
            yield where, value


def text_rows(path: str, file: TextIO, bad_rows: list[UserError]) -> SourceRows:
    """Yield a text file as one document, with line ends read as "\\n".

    A text longer than MAX_TEXT_LENGTH is yielded in parts, each of which ends where a line ends.
    """
    where = path
    while part := file.read(MAX_TEXT_LENGTH):
        part = (part + file.readline(MAX_TEXT_LENGTH)).replace("\r\n", "\n")
        if "\0" in part:
            problem = "NUL characters, as in UTF-16 that is read as UTF-8"
            raise UserError(f"{where}: {problem}; convert it: iconv -f UTF-16 -t utf-8.")
        if part.strip():
            yield where, {"text": part}
        where = f"{path} (continued)"
