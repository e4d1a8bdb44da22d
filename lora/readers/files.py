"""Rows of JSONL, JSON (a list), CSV or TSV files and whole text files, each also .gz, each row with its file:line."""

import csv
import gzip
import json
from pathlib import Path
import re
import zlib

from lora.errors import UserError


csv.field_size_limit(2**31 - 1)  # a cell may hold a document; csv's own limit is 128 KiB
HUB = "hf://datasets/"


def rows(path):
    """Yield (file:line, row as a dict). Raises UserError for what cannot be read.

    `path` is a local file, or a file of a data set on the Hub: hf://datasets/OWNER/NAME[@REVISION]/PATH.
    """
    readers = dict(
        jsonl=jsonl_rows, json=json_rows, csv=csv_rows, tsv=csv_rows, txt=text_rows, text=text_rows, md=text_rows
    )
    suffix = path.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix not in readers:
        raise UserError(f"{path}: expected a file named .{', .'.join(readers)} (or one of these with .gz).")
    try:
        opened = gzip.open if path.lower().endswith(".gz") else open
        with opened(local(path), "rt", encoding="utf-8-sig", newline="") as file:
            yield from readers[suffix](path, file)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: {error}.") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from None
    except EOFError:
        raise UserError(f"{path}: the compressed file ends early; copy it again.") from None
    except csv.Error as error:
        raise UserError(f"{path}: {error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; convert it: iconv -t utf-8."
        ) from None


def local(path):
    """Where the file lies; a Hub file is downloaded once, by huggingface_hub. Raises UserError."""
    if not path.startswith(HUB):
        if not Path(path).is_file():
            raise UserError(
                f"{path}: {'a folder; name its files' if Path(path).is_dir() else 'No such file or directory'}."
            )
        return Path(path)
    match = re.fullmatch(HUB + r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
    if not match:
        raise UserError(f"{path}: expected {HUB}OWNER/NAME/PATH (or OWNER/NAME@REVISION/PATH).")
    from huggingface_hub import hf_hub_download  # half a second, for those who ask for it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(match[1], match[3], repo_type="dataset", revision=match[2]))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
        raise UserError(f"{path}: {str(error).strip().splitlines()[0]}") from None


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
    table = csv.reader(file, delimiter="\t" if path.lower().removesuffix(".gz").endswith("tsv") else ",")
    names = None
    for values in filter(None, table):  # a blank line is no row
        where = f"{path}:{table.line_num}"
        if names is None:
            names = ["sentence1", "sentence2", "score"] if len(values) == 3 and is_number(values[2]) else values
            if names is values:
                continue
        if len(values) != len(names):
            raise UserError(f"{where}: {len(values)} columns, expected {len(names)} ({', '.join(names)}).")
        yield (
            where,
            {n: float(v) if n in ("score", "label", "weight") and is_number(v) else v for n, v in zip(names, values)},
        )


def text_rows(path, file):
    """A text file is one document; line ends are read as "\\n"."""
    text = file.read().replace("\r\n", "\n")
    if text.strip():
        yield path, {"text": text}


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
