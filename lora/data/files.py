"""Rows of JSONL, JSON (a list), CSV or TSV files and whole text files, each also .gz, each row with
its file:line.
"""

import csv
import gzip
import json
from pathlib import Path
import re
import zlib

from lora.common.errors import UserError

HUB = "hf://datasets/"
LISTED = 10  # of the bad rows of a file


def rows(path, bad=None):
    """Yield (file:line, row as a dict). Raises UserError for what cannot be read: after the last
    row, of all bad rows.

    A caller that finds faults of its own in the rows gives a list, `bad`, to which theirs are
    added, and calls `refuse`. `path` is a local file, or a file of a data set on the Hub:
    hf://datasets/OWNER/NAME[@REVISION]/PATH.
    """
    readers = {"jsonl": jsonl_rows, "json": json_rows, **dict.fromkeys(("csv", "tsv"), csv_rows)}
    readers |= dict.fromkeys(("txt", "text", "md"), text_rows)
    collected = [] if bad is None else bad
    suffix = path.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix not in readers:
        raise UserError(
            f"{path}: expected a file named .{', .'.join(readers)} (or one of these with .gz)."
        )
    try:
        opened = gzip.open if path.lower().endswith(".gz") else open
        with opened(local(path), "rt", encoding="utf-8-sig", newline="") as file:
            yield from readers[suffix](path, file, collected)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}.") from None
    except UnicodeDecodeError as error:
        line, byte = undecodable(opened(local(path), "rb")) or ("", error.object[error.start])
        mend = "convert it: iconv -f ITS_ENCODING -t utf-8"
        raise UserError(f"{path}:{line}: byte {byte:#04x} is not UTF-8; {mend}.") from None
    if bad is None:
        refuse(path, collected)


def undecodable(file):
    """(number of the first line that is not UTF-8, its first byte that is not)."""
    with file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return number, line[error.start]


def good(bad, function, *arguments):
    """[what `function` gives], or [] where it raises a UserError, which is then added to `bad`."""
    try:
        return [function(*arguments)]
    except UserError as error:
        bad.append(error)
        return []


def refuse(path, bad):
    """Raises UserError with the number of all bad rows, and the first ten of them."""
    if len(bad) > 1:
        listed = "; ".join(
            str(error).removeprefix(f"{path}:").strip(" .") for error in bad[:LISTED]
        )
        raise UserError(
            f"{path}: {len(bad)} bad rows: {listed}{'; ...' if len(bad) > LISTED else '.'}"
        )
    if bad:
        raise bad[0]


def local(path):
    """Where the file lies; a Hub file is downloaded once, by huggingface_hub. Raises UserError."""
    if not path.startswith(HUB):
        if not Path(path).is_file():
            found = (
                "a folder; name its files" if Path(path).is_dir() else "No such file or directory"
            )
            raise UserError(f"{path}: {found}.")
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
        return json.loads(text, object_pairs_hook=with_different_keys)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise UserError(f"{place}: not JSON ({error.msg}, column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error}).") from None


def with_different_keys(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return row


def as_row(where, value):
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return where, value


def jsonl_rows(path, file, bad):
    for number, line in enumerate(file, 1):
        if line.strip():
            yield from good(
                bad, lambda where, line: as_row(where, parse(where, line)), f"{path}:{number}", line
            )


def json_rows(path, file, bad):
    values = parse(path, file.read())
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a JSON list of objects, found {type(values).__name__}.")
    for number, value in enumerate(values, 1):
        yield from good(bad, as_row, f"{path}: row {number}", value)


def csv_rows(path, file, bad):
    """Rows under the names in the first line; three columns that end in a number are a pair without
    a header.
    """
    table = csv.reader(
        file, delimiter="\t" if path.lower().removesuffix(".gz").endswith("tsv") else ","
    )
    names = None
    for values in filter(None, table):  # a blank line is no row
        where = f"{path}:{table.line_num}"
        if names is None:
            names = (
                ["sentence1", "sentence2", "score"]
                if len(values) == 3 and is_number(values[2])
                else values
            )
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice:
                raise UserError(f"{where}: the column {twice!r} is there twice; rename one.")
            if names is values:
                continue
        if len(values) != len(names):
            bad.append(
                UserError(
                    f"{where}: {len(values)} columns, expected {len(names)} ({', '.join(names)})."
                )
            )
            continue
        numbers = ("score", "label", "weight")
        yield (
            where,
            {n: float(v) if n in numbers and is_number(v) else v for n, v in zip(names, values)},
        )


def text_rows(path, file, bad):
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


csv.field_size_limit(2**31 - 1)  # a cell may hold a document; csv's own limit is 128 KiB
